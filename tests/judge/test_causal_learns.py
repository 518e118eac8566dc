"""A model that has learnt to grade is read rightly: trained here for seconds, judged as usual."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import tinyjudge
from speciarl.judge.base import Pair
from speciarl.judge.causal import TransformersJudge
from speciarl.judge.labels import LabelPrompt
from speciarl.judge.prompt import LABELS, category_of
from speciarl.judge.scorer import shared_prefix
from speciarl.judge.taxonomy import Node, Taxonomy, TaxonomyJudge

# One label, and three names for every rung around it: what is said decides the grade.
TRUTH = "warbler"
NODES = [
    Node("animal", None, ("creature",), ""),
    Node("bird", "animal", (), ""),
    Node("songbird", "bird", ("Passeriformes", "perching bird"), ""),
    Node("warbler", "songbird", ("Parulidae", "wood warbler"), ""),
    *(Node(name, "warbler", (), "") for name in ("redstart", "ovenbird", "parula")),
    *(Node(name, "songbird", (), "") for name in ("finch", "thrush")),
    Node("orchid", None, (), ""),
]
REFUSALS = ("none", "unknown", "cannot tell")
STEPS, ROWS, RATE = 60, 24, 1e-2


def lessons() -> tuple[list[Pair], list[int]]:
    """Every name and refusal against the label, and the grade by the exact judge."""
    judge = TaxonomyJudge(Taxonomy(NODES, origin="test"))
    names = [name for node in NODES for name in (node.name, *node.synonyms)]
    pairs = [Pair(TRUTH, said) for said in (*names, *REFUSALS)]
    return pairs, [int(verdict.category or 0) for verdict in judge.grade(pairs)]


def taught(model: Any, prompt: LabelPrompt, pairs: list[Pair], target: Tensor) -> None:
    """Trains `model` to put the target letter after the prompt, each letter as often as another."""
    suffixes = [torch.tensor(prompt.suffix(pair)) for pair in pairs]
    ids, last = pad_sequence(suffixes, batch_first=True), torch.tensor([*map(len, suffixes)]) - 1
    head, rows = torch.tensor([prompt.head]), torch.arange(ROWS)
    positions = torch.arange(head.shape[1], head.shape[1] + ids.shape[1])[None]
    by_letter = [np.flatnonzero(target == i) for i in range(len(LABELS))]
    draw = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * (1 - step / STEPS)
        if step % 5 == 0:  # the instructions are read by weights a few steps old
            with torch.no_grad():
                prefix = shared_prefix(model, input_ids=head)
        some = torch.tensor([int(draw.choice(by_letter[i % len(LABELS)])) for i in range(ROWS)])
        out = model.model(input_ids=ids[some], past_key_values=prefix, position_ids=positions)
        hidden = out.last_hidden_state[rows, last[some]]
        logits = hidden @ model.lm_head.weight[list(prompt.labels)].T
        optimizer.zero_grad()
        functional.cross_entropy(logits, target[some]).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def graduate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.2 M parameters that has seen every pair a few dozen times."""
    pairs, grades = lessons()
    said = {pair.prediction for pair in pairs}
    tokenizer = tinyjudge.bytes_tokenizer([f'"{name}"' for name in sorted(said)] * 50)
    prompt = LabelPrompt(tokenizer)
    letters = {category_of(letter): i for i, letter in enumerate(LABELS)}
    config = tinyjudge.config_of("qwen2", tokenizer)
    config.initializer_range = 0.06
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
    taught(model, prompt, pairs, torch.tensor([letters[grade] for grade in grades]))
    folder = tmp_path_factory.mktemp("graduate")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_grades_as_it_was_taught(graduate: Path) -> None:
    pairs, grades = lessons()
    judge = TransformersJudge(graduate, device="cpu")
    verdicts = judge.grade(pairs)
    right = np.array([v.category == grade for v, grade in zip(verdicts, grades, strict=True)])
    margins = np.array([verdict.margin for verdict in verdicts])
    assert len(set(grades)) == len(LABELS)
    assert right.mean() > 0.7, right  # a guess has 1/6
    assert margins[right].mean() > 1.0
    # Asked in words, and read by letters, that it was not taught, the same model is lost.
    other = TransformersJudge(graduate, device="cpu", variant="referee")
    wrong = [v.category == g for v, g in zip(other.grade(pairs), grades, strict=True)]
    assert np.mean(wrong) < 0.5
