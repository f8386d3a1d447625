"""The page that `optlm verify --report` writes: one HTML file, to be read, printed and kept."""

from conversion.report.logits import Logits
from conversion.report.page import Files, page
from conversion.report.texts import printable

__all__ = ["Files", "Logits", "page", "printable"]
