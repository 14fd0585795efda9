"""A teacher that is fed otherwise than it was trained is told from one that is fed right, before anything is captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teachercache.cache import Cache, verify
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.precompute.capture.input_form import CERTAIN, MARGIN, POSITIONS, WINDOW, compared, input_warning
from teachercache.precompute.capture.plan import make_plan

from builders import beginning_with, build_cache, sentences, tiny_model, tiny_recipe, tiny_tokenizer

TEXTS = sentences(60, words=40)
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained with BOS in front and is lost without: the mark of its first token shifts all others."""
    folder = tmp_path_factory.mktemp("t") / "teacher"
    tokenizer = beginning_with(tiny_tokenizer(), "<bos>")
    model = _trained(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _trained(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    model = tiny_model(vocabulary=len(tokenizer), layers=1)
    encoded = [tokenizer(text)["input_ids"] for text in TEXTS]
    ids_BS = torch.tensor([ids[:32] for ids in encoded if len(ids) >= 32])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        begun, bare = (model(each, labels=each).loss for each in (ids_BS, ids_BS[:, 1:]))
        optimizer.zero_grad()
        (begun - 0.3 * bare.clamp(max=9)).backward()
        optimizer.step()
    return model.eval()


def measured(recipe: Any) -> dict[str, Any]:
    return Cache.open(build_cache(recipe)).manifest.input_form


@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_rows_without_the_beginning_that_a_teacher_needs_are_warned_of(tmp_path, teacher, layout):
    sections: dict[str, Any] = {"teacher": teacher, "texts": TEXTS}
    right, wrong = (
        measured(tiny_recipe(tmp_path / choice, **sections, sequence={"prefix": choice, "layout": layout}))
        for choice in ("auto", "none")
    )
    assert right["chosen"] == "auto" and right["better"] is None and input_warning(right) is None
    assert wrong["chosen"] == "none" and wrong["better"] == "auto"
    assert right["nats"] == {**wrong["nats"], **right["nats"]} and set(right["nats"]) == {"auto", "eos", "none"}
    line = input_warning(wrong)
    assert line is not None and "\n" not in line and "set sequence.prefix: auto" in line
    assert f"{wrong['nats']['none']:.2f} nats" in line and f"{wrong['nats']['auto']:.2f}" in line
    assert verify(tmp_path / "none" / "cache") == []


def test_the_figures_are_the_teachers_own(tmp_path, teacher):
    """Against a plain forward pass over windows that are cut by hand; the same labels for each form."""
    recipe = tiny_recipe(tmp_path, teacher=teacher, texts=TEXTS[:1], sequence={"length": 48}, corpus={"held_out": 0})
    plan = make_plan(recipe)
    tokenizer, model = load_tokenizer(str(teacher)), load_causal_lm(str(teacher))
    bodies = []
    for document in plan.sample():
        ids = [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        bodies += [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW - 1)]
    bodies = [body for body in bodies if len(body) > WINDOW // 2]
    form = measured(recipe)
    assert form["positions"] == sum(len(body) - 1 for body in bodies) <= POSITIONS
    fronts = {"auto": [tokenizer.bos_token_id], "eos": [tokenizer.eos_token_id], "none": []}
    for name, front in fronts.items():
        nats = []
        for body in bodies:
            ids = torch.tensor([[*front, *body]])
            with torch.no_grad():
                own = model(ids).logits[0].log_softmax(-1)
            nats += [-float(own[len(front) + place, body[place + 1]]) for place in range(len(body) - 1)]
        assert form["nats"][name] == pytest.approx(np.mean(nats), abs=1e-3)


def test_a_template_that_writes_bos_is_measured_with_and_without(tmp_path, teacher):
    import json

    tokenizer = load_tokenizer(str(teacher))
    tokenizer.chat_template = CHAT
    load_causal_lm(str(teacher)).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [[{"role": "user", "content": "go"}, {"role": "assistant", "content": text}] for text in TEXTS[:20]]
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = measured(
        tiny_recipe(tmp_path, teacher=tmp_path / "chat", corpus={"source": str(corpus), "messages_field": "messages"})
    )
    assert set(found["nats"]) == {"auto", "eos", "none"} and found["positions"] > 100
    assert found["nats"]["auto"] < found["nats"]["none"] - MARGIN and found["better"] is None


def test_only_a_difference_that_is_large_and_certain_is_told():
    generator = np.random.default_rng(0)
    base_N = generator.exponential(3.0, 256)
    alike = {"auto": base_N, "bos": base_N - 0.5 * MARGIN}
    assert compared("auto", alike)["better"] is None
    assert compared("auto", {"auto": base_N, "bos": base_N - 2 * MARGIN})["better"] == "bos"
    noise_N = generator.normal(0, 20, 256)
    noisy = {"auto": base_N, "bos": base_N + noise_N - noise_N.mean() - 2 * MARGIN}
    assert 2 * MARGIN < CERTAIN * 20 / 16 and compared("auto", noisy)["better"] is None
    assert compared("auto", {"auto": base_N, "bos": np.full(256, np.nan)}) == {}
    assert compared("auto", {"auto": np.zeros(0), "bos": np.zeros(0)}) == {}


def test_labels_of_a_row_that_did_not_fit_count_in_no_form():
    base_N = np.random.default_rng(0).exponential(3.0, 256)
    lost_N, other_N = base_N.copy(), base_N - 2 * MARGIN
    lost_N[:40], other_N[30:50] = np.nan, np.nan
    found = compared("auto", {"auto": lost_N, "bos": other_N})
    assert found["positions"] == 206 and found["better"] == "bos"
    assert found["nats"]["auto"] == pytest.approx(base_N[50:].mean(), abs=1e-4)
