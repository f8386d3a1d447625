"""The README that `train_tiny_opt.py` writes beside the weights."""

from collections.abc import Mapping
from typing import Any

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small OPT for demonstrations and tests: {parameters:,} parameters, trained from nothing on one
text by `docs/examples/train_tiny_opt.py` of optlm. It writes what looks like its source and knows
nothing else. The architecture is that of Meta's OPT (norms before each block, ReLU, learned
positions, tied embeddings): {layers} layers of width {hidden_size}, {heads} heads, {context}
positions. The tokenizer is a byte-level BPE laid out as OPT's, trained on the same part of the
text. Weights are float16.

## Text

| | |
| --- | --- |
| file | `{file}`, {bytes:,} bytes |
| source | {source} |
| sha256 | `{sha256}` |
| trained on | the first {train_characters:,} characters |
| held out | the last {held_out_characters:,} characters; the tokenizer has not seen them either |

The text itself is not part of this folder.

## Training

```console
python docs/examples/train_tiny_opt.py --text {file} --out {name} --steps {steps} --seed {seed}
```

| | |
| --- | --- |
| steps | {steps:,} of {rows_per_step} rows with {context} tokens; weights kept from step {step:,} |
| seed | {seed} |
| optimizer | AdamW, betas {betas}, weight decay {weight_decay} |
| gradients | cut to norm {largest_gradient_norm} |
| learning rate | {learning_rate}, {warmup_steps} steps of warm-up, then a cosine to zero |
| dropout | {dropout} |
| time | {minutes} minutes on {threads} threads of a CPU |
| versions | {versions} |

The same command on the same machine with the same versions writes the same weights; elsewhere
rounding differs, and the losses with it in the last digits.

## Losses

| | nats per token | perplexity | bits per character |
| --- | --- | --- | --- |
| training, with dropout, mean over the steps before step {step:,} | {train:.4f} | | |
| held-out part, whole | {held_out[nats_per_token]:.4f} | {held_out[perplexity]:.2f} | \
{held_out[bits_per_character]:.4f} |
| the first {excerpt[characters]:,} characters of it | {excerpt[nats_per_token]:.4f} | \
{excerpt[perplexity]:.2f} | {excerpt[bits_per_character]:.4f} |

Held-out figures are those of the float16 weights in this folder, computed in float32, as
`optlm eval {name} --text FILE` gives them: windows of {context} tokens, half a window apart.
Of {points} points of the training the one with the lowest held-out loss was kept, so these figures
are slightly better than those of a text that had no say in the choice. A uniform guess among the
{vocabulary:,} tokens has {guess:.4f} nats per token.

## Sample

`optlm generate {name} --prompt $'ROMEO:\\n' --temperature 0.8 --top-k 40 --seed 1 \
--max-new-tokens 120`

```text
{sample}
```

## Licence

Weights, tokenizer and recipe: Apache-2.0, as optlm.
"""


def card(record: Mapping[str, Any], name: str) -> str:
    """The README of a training, in Markdown, from its `training.json`."""
    recipe = {**record["recipe"], "betas": tuple(record["recipe"]["betas"])}
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    groups = {**recipe, **record["text"], **record["chosen"]}
    rest = {key: value for key, value in record.items() if key not in ("recipe", "text", "chosen")}
    return CARD.format(**{**groups, **rest, "versions": versions, "name": name})
