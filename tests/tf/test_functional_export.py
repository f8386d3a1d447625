"""Our models as layers of the Functional API, and as programs that run without this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core.weights import Head
from tests.cases import HEADS, random_weights, tiny, words
from tests.tolerances import assert_near
from tests.wings import Wing

IDS = words(4, 6).astype(np.int32)
MASK = np.array(
    [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32
)
X = {"input_ids": IDS, "attention_mask": MASK}
MAIN = {
    Head.NONE: "last_hidden_state",
    Head.CAUSAL_LM: "logits",
    Head.SEQUENCE_CLASSIFICATION: "logits",
    Head.QUESTION_ANSWERING: "start_logits",
}
#: Runs a saved program where this package cannot be imported: greedy tokens through its cache.
DECODE = """
import sys
sys.modules.update({name: None for name in ("opt_tf", "opt_core", "keras")})
import numpy as np
import tensorflow as tf

program = tf.saved_model.load(sys.argv[1])
layers, heads, width, count = map(int, sys.argv[2:])
ids = np.array([[2, 7, 9, 30], [1, 2, 8, 21]], np.int32)
mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1]], np.int32)
keys = values = np.zeros((layers, 2, heads, 0, width), np.float32)
tokens = ids
for _ in range(count):
    out = program.signatures["serving_default"](
        input_ids=tf.constant(ids), attention_mask=tf.constant(mask),
        keys=tf.constant(keys), values=tf.constant(values),
    )
    keys, values = out["keys"].numpy(), out["values"].numpy()
    ids = out["logits"].numpy().argmax(-1)[:, None].astype(np.int32)
    tokens, mask = np.hstack((tokens, ids)), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
print(tokens.tolist())
"""


def build(wing: Wing, head: Head = Head.CAUSAL_LM, **changes: Any) -> Any:
    config = tiny(**{"dropout": 0.0, "num_labels": 3, **changes})
    return wing.build(head, config, random_weights(config, head))


def inputs() -> dict[str, Any]:
    return {name: keras.Input((None,), dtype="int32", name=name) for name in X}


# The Functional API


@pytest.mark.parametrize("head", HEADS)
def test_symbolic_calls_give_a_plain_dictionary_with_shapes(wing: Wing, head: Head) -> None:
    model = build(wing, head)
    out = model(inputs())
    assert type(out) is dict
    names = ("start_logits", "end_logits") if head is Head.QUESTION_ANSWERING else (MAIN[head],)
    assert set(out) == set(names)
    ends = {Head.NONE: (None, 16), Head.CAUSAL_LM: (None, 40), Head.QUESTION_ANSWERING: (None,)}
    assert out[MAIN[head]].shape == (None, *ends.get(head, (3,)))
    given = inputs()
    functional = keras.Model(given, model(given)[MAIN[head]])
    np.testing.assert_allclose(functional(X), model(X)[MAIN[head]], atol=1e-6)


def test_every_way_to_pass_symbolic_inputs_works(wing: Wing) -> None:
    model = build(wing, num_hidden_layers=1)
    right = model(X).logits
    ids, mask = inputs().values()
    for out in (
        model(ids, attention_mask=mask),
        model(input_ids=ids, attention_mask=mask),
        model([ids, None, mask]),
    ):
        found = keras.Model([ids, mask], out["logits"])([IDS, MASK])
        assert_near(found, right, "same program")


def test_a_model_under_other_layers_is_trained_saved_and_loaded(wing: Wing, tmp_path: Path) -> None:
    model = build(wing, Head.NONE, num_hidden_layers=1)
    given = inputs()
    hidden = model(given)["last_hidden_state"]
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    whole = keras.Model(given, keras.layers.Dense(2)(pooled))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole.compile(keras.optimizers.Adam(1e-2), loss=loss, jit_compile=False)
    y = np.array([0, 1, 1, 0])
    before = model.decoder.layers[0].fc1.kernel.numpy()
    losses = whole.fit(X, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert not np.array_equal(model.decoder.layers[0].fc1.kernel, before)
    whole.save(tmp_path / "whole.keras")
    other = keras.models.load_model(tmp_path / "whole.keras")
    np.testing.assert_allclose(other.predict(X, verbose=0), whole.predict(X, verbose=0), atol=1e-6)


def test_hidden_states_and_a_cache_can_be_asked_for_symbolically(wing: Wing) -> None:
    model = build(wing)
    ids = keras.Input((None,), dtype="int32")
    out = model(ids, use_cache=True, output_hidden_states=True, output_attentions=True)
    whole = keras.Model(ids, [out["hidden_states"], out["past_key_values"], out["attentions"]])
    states, pairs, attentions = whole(IDS)
    right = model(IDS, output_hidden_states=True, output_attentions=True)
    for found, expected in zip(states, right.hidden_states, strict=True):
        assert_near(found, expected, "same program")
    for (key, value), (right_key, right_value) in zip(pairs, right.past_key_values, strict=True):
        assert_near(key, right_key, "same program")
        assert_near(value, right_value, "same program")
    for found, expected in zip(attentions, right.attentions, strict=True):
        assert_near(found, expected, "same program")


def test_embeddings_may_be_the_symbolic_input(wing: Wing) -> None:
    model = build(wing)
    embeds = keras.Input((None, 16))
    whole = keras.Model(embeds, model(inputs_embeds=embeds)["logits"])
    found = whole(model.get_input_embeddings()(IDS))
    assert_near(found, model(IDS).logits, "same program")


def test_one_model_may_stand_in_a_graph_twice(wing: Wing) -> None:
    model = build(wing, Head.NONE)
    one, two = (keras.Input((None,), dtype="int32") for _ in range(2))
    ends = [model(ids)["last_hidden_state"][:, -1] for ids in (one, two)]
    whole = keras.Model([one, two], keras.layers.Dot(1)(ends))
    assert len(whole.trainable_weights) == len(model.trainable_weights)
    right = [model(ids).last_hidden_state[:, -1].numpy() for ids in (IDS, IDS[::-1])]
    found = whole([IDS, np.ascontiguousarray(IDS[::-1])])
    np.testing.assert_allclose(found[:, 0], (right[0] * right[1]).sum(1), rtol=1e-4, atol=1e-5)


# Exported programs


@pytest.mark.parametrize("head", HEADS)
def test_an_exported_program_computes_what_the_model_does(
    wing: Wing, tmp_path: Path, head: Head
) -> None:
    model = build(wing, head)
    model.export(tmp_path / "program", verbose=False)
    program = tf.saved_model.load(str(tmp_path / "program"))
    for rows, length in ((4, 6), (1, 3)):
        part = {name: tf.constant(values[:rows, -length:]) for name, values in X.items()}
        right = model(part)
        found = program.signatures["serving_default"](**part)
        assert set(found) == set(right) - {"past_key_values"}
        assert_near(found[MAIN[head]], right[MAIN[head]], "same program")
        assert_near(program.serve(part)[MAIN[head]], right[MAIN[head]], "same program")


def test_a_signature_may_be_ones_own(wing: Wing, tmp_path: Path) -> None:
    model = build(wing)
    spec = keras.layers.InputSpec(shape=(None, None), dtype="int32")
    model.export(tmp_path / "program", verbose=False, input_signature=[spec])
    program = tf.saved_model.load(str(tmp_path / "program"))
    assert_near(program.serve(tf.constant(IDS))["logits"], model(IDS).logits, "same program")


def test_what_padding_holds_changes_no_exported_result(wing: Wing, tmp_path: Path) -> None:
    model = build(wing)
    model.export(tmp_path / "program", verbose=False)
    program = tf.saved_model.load(str(tmp_path / "program"))
    right = program.serve({k: tf.constant(v[:1, 2:]) for k, v in X.items()})["logits"]
    for width in (1, 2, 5):
        ids = np.pad(IDS[:1, 2:], ((0, 0), (width, 0)), constant_values=9)
        mask = np.pad(MASK[:1, 2:], ((0, 0), (width, 0)))
        out = program.serve({"input_ids": tf.constant(ids), "attention_mask": tf.constant(mask)})
        assert_near(out["logits"][:, width:], right, "same program")


def export_with_cache(model: Any, folder: Path) -> None:
    """A signature that takes keys and values of all layers, and gives those of one call more."""
    config = model.config
    cached = tf.TensorSpec(
        [config.num_hidden_layers, None, config.num_attention_heads, None, config.head_dim],
        tf.float32,
    )
    whole = tf.TensorSpec([None, None], tf.int32)

    def serve(input_ids: Any, attention_mask: Any, keys: Any, values: Any) -> dict[str, Any]:
        past = list(zip(tf.unstack(keys), tf.unstack(values), strict=True))
        out = model(input_ids, attention_mask=attention_mask, past_key_values=past, use_cache=True)
        new_keys, new_values = zip(*out["past_key_values"], strict=True)
        return {
            "logits": out["logits"][:, -1],
            "keys": tf.stack(new_keys),
            "values": tf.stack(new_values),
        }

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", serve, input_signature=[whole, whole, cached, cached])
    archive.write_out(folder, verbose=False)


def test_a_served_program_with_a_cache_decodes_as_generate_does(wing: Wing, tmp_path: Path) -> None:
    config = tiny(dropout=0.0)
    weights = random_weights(config, Head.CAUSAL_LM, std=0.3)
    model = wing.build(Head.CAUSAL_LM, config, weights)
    export_with_cache(model, tmp_path / "program")
    program = str(tmp_path / "program")
    done = subprocess.run(
        [sys.executable, "-c", DECODE, program, "2", "4", "4", "8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ids, mask = np.array([[2, 7, 9, 30], [1, 2, 8, 21]]), np.array([[1, 1, 1, 1], [0, 1, 1, 1]])
    right = model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None)
    assert done.stdout.split("\n")[-2] == str(right.numpy().tolist())


def test_a_served_program_may_hold_a_cache_of_fixed_shape(wing: Wing, tmp_path: Path) -> None:
    from opt_tf import Cache

    model = build(wing)
    room = Cache.empty(model.config, 2, 12, tf.float32)
    module = tf.Module()
    module.model = model

    @tf.function(input_signature=[tf.TensorSpec([2, 1], tf.int32), *map(spec_of, parts(room))])
    def step(ids: Any, *flat: Any) -> dict[str, Any]:
        cache = tf.nest.pack_sequence_as(room, flat, expand_composites=True)
        out = model(ids, past_key_values=cache, use_cache=True)
        held = parts(out["past_key_values"])
        return {"logits": out["logits"], **{f"cache_{i}": part for i, part in enumerate(held)}}

    module.step = step
    tf.saved_model.save(module, str(tmp_path / "program"))
    loaded = tf.saved_model.load(str(tmp_path / "program"))
    flat, right = parts(room), model(IDS[:2]).logits
    for place in range(6):
        out = loaded.step(tf.constant(IDS[:2, place : place + 1]), *flat)
        flat = [out[f"cache_{i}"] for i in range(len(flat))]
        assert_near(out["logits"], right[:, place : place + 1], "float32")


def parts(cache: Any) -> list[Any]:
    flat: list[Any] = tf.nest.flatten(cache, expand_composites=True)
    return flat


def spec_of(part: Any) -> Any:
    return tf.TensorSpec(part.shape, part.dtype)
