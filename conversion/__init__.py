"""Other people's checkpoint files, read and written as NumPy arrays without any framework."""
