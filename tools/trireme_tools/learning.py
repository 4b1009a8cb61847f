"""Learning: the small model on word problems, against the clock. Batches, the loop, and its score; the model is in small_model.py."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM

from trireme.core.refusal import Refusal
from trireme_tools.problems import NUM_HELD_OUT, Problem, answer_of, held_out_problems, training_problems
from trireme_tools.small_model import Learner, Losses, small_config, write_model
from trireme_tools.small_tokenizer import END, END_ID, make_tokenizer, write_tokenizer

_VOCAB_SIZE = 1024  # at most
_NUM_TEXTS = 5000  # that the tokenizer is made of
_QUESTION_WEIGHT = 0.05  # of a token of a question, which nobody can foresee, against one of an answer
_BLOCK = 64  # rows are padded to a multiple, as the chunks of the gated delta rule are
_MAX_ANSWER = 128  # tokens; the longest solution has about 100
_WARM_UP = 0.03  # of the time
_LOG_EVERY = 20  # steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    seed: int
    minutes: float
    batch_size: int  # problems of a step
    learning_rate: float  # at its peak, after the warm-up; then straight down to zero
    evaluate_every_s: float
    num_evaluated: int = 256  # held-out problems
    num_evaluated_last: int = NUM_HELD_OUT

    def rate(self, progress: float) -> float:
        """At `progress` from 0 to 1 of the time."""
        return self.learning_rate * min(progress / _WARM_UP, (1.0 - progress) / (1.0 - _WARM_UP))


def learn(
    recipe: Recipe,
    output: Path,
    device: str,
    show: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.monotonic,
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Trains and writes the checkpoint; the entries of its log (train.jsonl), which `show` gets one by one. `clock` is read once
    a step, and after each evaluation. `sizes` are of the model, in its config's words."""
    torch.manual_seed(recipe.seed)
    texts = (problem.prompt + problem.solution for problem in islice(training_problems(recipe.seed), _NUM_TEXTS))
    tokenizer = make_tokenizer(texts, _VOCAB_SIZE)
    write_tokenizer(tokenizer, output)
    # grouped products are faster where there are thousands of rows; a loop over experts is on a CPU
    experts = "grouped_mm" if device == "cuda" else "eager"
    config = small_config(tokenizer.get_vocab_size(), END_ID, experts_implementation=experts, **sizes)
    learner = Learner(config).to(device)
    optimizer = _optimizer(learner, device)
    held_out, batches = held_out_problems(), _batches(recipe, tokenizer, device)
    try:
        _step(learner, optimizer, next(batches), 0.0)  # compiles what a GPU needs
    except torch.OutOfMemoryError as error:
        raise Refusal(f"{recipe.batch_size} problems are too many for a step", why=str(error), fix="give a smaller --batch-size") from None
    (output / "train.json").write_text(json.dumps(_about(recipe, learner, device), indent=2) + "\n")

    entries: list[dict[str, Any]] = []
    began, evaluated_at, progress, step = clock(), 0.0, 0.0, 0
    with (output / "train.jsonl").open("w") as log:
        while progress < 1.0:
            step += 1
            seconds = clock() - began
            progress = min(1.0, seconds / (60 * recipe.minutes))
            losses = _step(learner, optimizer, next(batches), recipe.rate(progress))
            evaluates = progress == 1.0 or seconds - evaluated_at >= recipe.evaluate_every_s
            if not evaluates and step % _LOG_EVERY:
                continue  # to read a loss is to wait for the GPU
            entry = {"step": step, "problems": step * recipe.batch_size, "seconds": round(seconds, 1), "progress": round(progress, 4)}
            entry |= _rounded(losses)
            if evaluates:
                write_model(learner, output)
                some = held_out[: recipe.num_evaluated_last if progress == 1.0 else recipe.num_evaluated]
                entry |= {"held_out": len(some), "exact_match": round(exact_match(output, tokenizer, some, device), 4)}
                evaluated_at = clock() - began
            entries.append(entry)
            print(json.dumps(entry), file=log, flush=True)
            show(entry)
    return entries


def _optimizer(learner: Learner, device: str) -> torch.optim.Optimizer:
    """Decays matrices alone."""
    matrices = [parameter for parameter in learner.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in learner.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device == "cuda")


def _step(learner: Learner, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], rate: float) -> Losses:
    """One update. On a GPU it computes in bfloat16, as the checkpoint will be served; the learner's own numbers stay float32."""
    parameters: dict[str, Tensor] = dict(learner.named_parameters())
    if batch[0].is_cuda:
        parameters = {name: parameter.bfloat16() for name, parameter in parameters.items()}
    losses = torch.func.functional_call(learner, parameters, batch)
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return losses


def _rounded(losses: Losses) -> dict[str, Any]:
    drafts = [round(loss, 4) for loss in losses.drafts.tolist()]
    return {"loss": round(losses.trunk.item(), 4), "draft_losses": drafts, "balance": round(losses.balance.item(), 4)}


def _about(recipe: Recipe, learner: Learner, device: str) -> dict[str, Any]:
    """What to say of a training beside its log."""
    parameters = {"trunk": learner.trunk, "mtp": learner.mtp}
    return {
        "recipe": asdict(recipe),
        "parameters": {name: sum(each.numel() for each in module.parameters()) for name, module in parameters.items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


@dataclass(frozen=True)
class _Batches(Dataset):
    """Batch n of a seed, the same whichever worker makes it: tokens int64 [B, L] and the weights of their losses [B, L]."""

    recipe: Recipe
    tokenizer: Tokenizer

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        problems = list(islice(training_problems(f"{self.recipe.seed} {number}"), self.recipe.batch_size))
        prompts = self.tokenizer.encode_batch([problem.prompt for problem in problems])
        solutions = self.tokenizer.encode_batch([problem.solution + END for problem in problems])
        longest = max(len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions, strict=True))
        length = -(-longest // _BLOCK) * _BLOCK
        tokens = torch.full((len(problems), length), END_ID)
        weights = torch.zeros(len(problems), length)
        for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
            asked, said = len(prompt), len(prompt) + len(solution)
            tokens[row, :said] = torch.tensor(prompt.ids + solution.ids)
            weights[row, :asked], weights[row, asked:said] = _QUESTION_WEIGHT, 1.0
        return tokens, weights


def _batches(recipe: Recipe, tokenizer: Tokenizer, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch 0, 1, 2, ... on the device. A GPU is faster than one process that writes problems."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of the processes that are forked here
    num_workers = min(8, len(os.sched_getaffinity(0)) - 1) if device == "cuda" else 0
    loader = DataLoader(_Batches(recipe, tokenizer), batch_size=None, sampler=count(), num_workers=num_workers, pin_memory=device == "cuda")
    for tokens, weights in loader:
        yield tokens.to(device, non_blocking=True), weights.to(device, non_blocking=True)


@torch.inference_mode()
def exact_match(checkpoint: Path, tokenizer: Tokenizer, problems: Sequence[Problem], device: str) -> float:
    """Share of the problems that the checkpoint answers right, by transformers, greedily."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto" if device == "cuda" else torch.float32)
    prompts = [tokenizer.encode(problem.prompt).ids for problem in problems]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[END_ID] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    made = model.to(device).eval().generate(input_ids=tokens, attention_mask=mask, max_new_tokens=_MAX_ANSWER, do_sample=False)
    answers = tokenizer.decode_batch(made[:, longest:].tolist())
    return sum(answer_of(answer) == problem.answer for answer, problem in zip(answers, problems, strict=True)) / len(problems)
