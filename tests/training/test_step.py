import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dovetail.batches import PackedBatch, RankedBatch, SummedLoss, pack_ranked
from dovetail.errors import TrainingStopped
from dovetail.training.optim import Optimizer, build_optimizer
from dovetail.training.step import StepReport, Term, TokenBudget
from tests.fakes import tiny_model
from tests.training.toy import Toy, loss_of, same_bits, step, toy_batch, weights_of

CPU = torch.device("cpu")


def gradients_seen(model: nn.Module, run: Callable[[Optimizer], object]) -> dict[str, Tensor]:
    """The gradients as the update takes them: times the scale it is given."""
    optimizer = build_optimizer(model, learning_rate=0.1)
    seen: dict[str, Tensor] = {}
    update = optimizer.step

    def spy(scale: Tensor) -> None:
        seen.update({name: g * float(scale) for name, g in optimizer.gradients().items()})
        update(scale)

    optimizer.step = spy  # type: ignore[method-assign]
    run(optimizer)
    return seen


def one_by_one(model: nn.Module, batch: PackedBatch) -> Tensor:
    """-log p of the marked tokens, one sequence after another, one token after another."""
    starts = batch.cu_seqlens_S1.tolist()
    total = torch.zeros((), dtype=torch.float64)
    for a, b in pairwise(starts):
        output = model(batch.token_ids_T[None, a:b] if hasattr(model, "config") else batch.token_ids_T[a:b])
        logits_TV = output.logits[0] if hasattr(output, "logits") else output
        for t in range(a + 1, b):
            if batch.mask_T[t]:
                total = total - logits_TV[t - 1 - a].log_softmax(-1)[batch.token_ids_T[t]]
    return total


@pytest.mark.parametrize("budget", [1, 5, 9, 12, 17, 1000])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(budget: int) -> None:
    batch = toy_batch()
    model, reference = Toy(dtype=torch.float64), Toy(dtype=torch.float64)
    (one_by_one(reference, batch) / int(batch.mask_T.sum())).backward()
    term = Term(batch, partial(loss_of, model))
    found = gradients_seen(model, lambda optimizer: step(model, [term], budget=budget, optimizer=optimizer))
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("budget", [8, 1000])
def test_it_holds_for_a_transformer_too(budget: int) -> None:
    batch = replace(toy_batch(), token_ids_T=toy_batch().token_ids_T + 40)
    model, reference = tiny_model("llama", dtype=torch.float64), tiny_model("llama", dtype=torch.float64)
    (one_by_one(reference, batch) / int(batch.mask_T.sum())).backward()

    def loss(micro: PackedBatch) -> SummedLoss:
        return SummedLoss(one_by_one(model, micro), micro.mask_T.sum())

    term = Term(batch, loss)
    found = gradients_seen(model, lambda optimizer: step(model, [term], budget=budget, optimizer=optimizer))
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


def ranked_batch() -> RankedBatch:
    groups = [[[1, 2, 3], [1, 2, 4]], [[5, 6], [5, 7, 8], [5, 9]], [[1, 1], [2, 2]]]
    return pack_ranked(groups, [[(0, 1, 0.0)], [(0, 1, 0.5), (1, 2, 0.0), (0, 2, 0.0)], [(1, 0, 0.0)]])


@pytest.mark.parametrize("budget", [1, 6, 10, 100])
def test_each_prompt_of_a_ranking_counts_once_however_it_is_cut(budget: int) -> None:
    batch = ranked_batch()
    model, reference = Toy(dtype=torch.float64), Toy(dtype=torch.float64)

    def loss(model: nn.Module, micro: RankedBatch) -> SummedLoss:
        scores_S = model(micro.token_ids_T)[micro.last_index_S(), 0]
        gaps_P = scores_S[micro.chosen_P] - scores_S[micro.rejected_P] - micro.margin_P
        return SummedLoss(-(micro.weight_P * nn.functional.logsigmoid(gaps_P)).sum(), micro.weight_P.sum())

    def score(ids: list[int]) -> Tensor:
        return reference(torch.tensor(ids))[-1, 0]

    def pair(better: list[int], worse: list[int], margin: float = 0.0) -> Tensor:
        return -(1 / (1 + torch.exp(-(score(better) - score(worse) - margin)))).log()

    expected = (
        pair([1, 2, 3], [1, 2, 4])
        + (pair([5, 6], [5, 7, 8], 0.5) + pair([5, 7, 8], [5, 9]) + pair([5, 6], [5, 9])) / 3
        + pair([2, 2], [1, 1])
    ) / 3
    expected.backward()
    term = Term(batch, partial(loss, model))
    found = gradients_seen(model, lambda optimizer: step(model, [term], budget=budget, optimizer=optimizer))
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9)  # weights are float32


@pytest.mark.parametrize("budget", [5, 1000])
def test_terms_are_normalised_each_by_its_own_count_and_weighted(budget: int) -> None:
    """grad(total) = grad(policy) + c * grad(ptx), whatever the sizes of the two batches."""
    first, second = toy_batch(0), toy_batch(1, lengths=(4, 6, 3))
    model, reference = Toy(dtype=torch.float64), Toy(dtype=torch.float64)
    one = one_by_one(reference, first) / int(first.mask_T.sum())
    other = one_by_one(reference, second) / int(second.mask_T.sum())
    (one + 2.5 * other).backward()
    one, other = one.detach(), other.detach()
    terms = [
        Term(first, partial(loss_of, model), name="policy"),
        Term(second, partial(loss_of, model), weight=2.5, name="ptx"),
    ]
    reports: list[StepReport] = []
    found = gradients_seen(
        model, lambda optimizer: reports.append(step(model, terms, budget=budget, optimizer=optimizer))
    )
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)
    assert reports[0].losses == pytest.approx({"policy": float(one), "ptx": float(other)}, rel=1e-12)
    assert reports[0].loss == pytest.approx(float(one + 2.5 * other), rel=1e-12)
    assert reports[0].num_tokens == first.num_tokens + second.num_tokens


@pytest.mark.parametrize("budget", [5, 1000])
def test_the_report_says_what_happened(budget: int) -> None:
    batch, model = toy_batch(), Toy(dtype=torch.float64)
    (one_by_one(model, batch) / int(batch.mask_T.sum())).backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    logits = model(batch.token_ids_T).detach()
    logps = [
        float(logits[t - 1].log_softmax(-1)[batch.token_ids_T[t]]) for t in batch.mask_T.nonzero().flatten()
    ]
    report = step(model, [Term(batch, partial(loss_of, model), name="sft")], budget=budget)
    assert report.loss == pytest.approx(-sum(logps) / len(logps), rel=1e-12)
    assert report.grad_norm == pytest.approx(norm, rel=1e-10)
    assert report.stats == pytest.approx({"sft/unlikely": sum(p < -3 for p in logps) / len(logps)})
    assert report.learning_rate == 0.01
    assert not report.skipped


def test_the_gradient_is_clipped_over_the_whole_model_after_accumulation() -> None:
    batch = toy_batch()
    free, clipped = Toy(dtype=torch.float64), Toy(dtype=torch.float64)
    whole = gradients_seen(free, lambda o: step(free, [Term(batch, partial(loss_of, free))], optimizer=o))
    norm = math.sqrt(sum(float((g**2).sum()) for g in whole.values()))
    terms = [Term(batch, partial(loss_of, clipped))]
    found = gradients_seen(
        clipped, lambda o: step(clipped, terms, budget=5, optimizer=o, max_grad_norm=norm / 4)
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient / 4, rtol=1e-5, atol=1e-12)


def test_a_small_gradient_is_left_as_it_is() -> None:
    batch = toy_batch()
    models = [Toy(), Toy()]
    for model, limit in zip(models, (math.inf, 1000.0), strict=True):
        step(model, [Term(batch, partial(loss_of, model))], max_grad_norm=limit)
    assert same_bits(weights_of(models[0]), weights_of(models[1]))


def test_the_rate_is_the_one_given_and_no_gradient_is_left_behind() -> None:
    model = Toy()
    before = weights_of(model)
    step(model, [Term(toy_batch(), partial(loss_of, model))])
    moved = (model.layer.weight.detach() - before["layer.weight"]).abs()
    assert float(moved.max()) == pytest.approx(0.01, rel=1e-3)  # AdamW's first step is the rate
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_from_elsewhere_do_not_leak_in() -> None:
    models = [Toy(), Toy()]
    models[0].layer.weight.grad = torch.ones_like(models[0].layer.weight)
    for model in models:
        step(model, [Term(toy_batch(), partial(loss_of, model))])
    assert same_bits(weights_of(models[0]), weights_of(models[1]))


def out_of_memory_above(limit: int, model: nn.Module, micro: PackedBatch) -> SummedLoss:
    loss = loss_of(model, micro)
    if micro.num_tokens > limit:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return loss


def test_running_out_of_memory_halves_the_budget_and_gives_the_same_update(
    capsys: pytest.CaptureFixture[str],
) -> None:
    batch = toy_batch()  # 30 tokens, the longest sequence 9
    model, plain = Toy(dtype=torch.float64), Toy(dtype=torch.float64)
    budget = TokenBudget(24)
    report = step(model, [Term(batch, partial(out_of_memory_above, 13, model))], budget=budget)
    expected = step(plain, [Term(batch, partial(loss_of, plain))], budget=12)
    assert budget.tokens == 12
    assert same_bits(weights_of(model), weights_of(plain))
    assert report == expected
    assert "halved from 24 to 12 tokens" in capsys.readouterr().err


def test_a_failure_in_the_second_micro_batch_leaves_nothing_of_the_first() -> None:
    batch = toy_batch()
    model, plain = Toy(dtype=torch.bfloat16), Toy(dtype=torch.bfloat16)
    calls: list[int] = []

    def fails_once(micro: PackedBatch) -> SummedLoss:
        calls.append(micro.num_tokens)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return loss_of(model, micro)

    step(model, [Term(batch, fails_once)], budget=20)
    step(plain, [Term(batch, partial(loss_of, plain))], budget=10)
    assert same_bits(weights_of(model), weights_of(plain))


def test_a_sequence_that_does_not_fit_alone_stops_the_run_and_changes_nothing() -> None:
    model = Toy()
    before = weights_of(model)
    with pytest.raises(TrainingStopped, match="one sequence of 9 tokens does not fit in memory"):
        step(model, [Term(toy_batch(), partial(out_of_memory_above, 8, model))])
    assert same_bits(weights_of(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fp16_finds_its_loss_scale_without_alarm() -> None:
    model = Toy(dtype=torch.float16)
    optimizer = build_optimizer(model, learning_rate=0.1)
    assert optimizer.scaler is not None
    optimizer.scaler.scale = 2.0**40  # overflows fp16 gradients for certain
    term = Term(toy_batch(), partial(loss_of, model))
    reports = [step(model, [term], optimizer=optimizer) for _ in range(40)]
    skips = [report.skipped for report in reports]
    assert skips[0]
    assert not skips[-1]
    assert optimizer.skipped_in_a_row == 0
    assert optimizer.scaler.scale == 2.0 ** (40 - sum(skips))


def test_the_loss_scale_leaves_loss_norm_and_update_as_they_are() -> None:
    batch, reports = toy_batch(), []
    models = [Toy(dtype=torch.float16), Toy(dtype=torch.float16)]
    for model, scale in zip(models, (1.0, 128.0), strict=True):
        optimizer = build_optimizer(model, learning_rate=0.1)
        assert optimizer.scaler is not None
        optimizer.scaler.scale = scale
        reports.append(step(model, [Term(batch, partial(loss_of, model))], optimizer=optimizer))
    assert reports[0].loss == reports[1].loss
    torch.testing.assert_close(
        torch.tensor(reports[0].grad_norm), torch.tensor(reports[1].grad_norm), rtol=1e-3, atol=0
    )


def test_micro_batches_without_targets_are_passed_over() -> None:
    batch = toy_batch()
    mask_T = batch.mask_T.clone()
    mask_T[7:] = False  # only the first sequence counts
    batch = replace(batch, mask_T=mask_T, target_counts=(int(mask_T.sum()), *[0] * (len(batch.lengths) - 1)))
    seen: list[float] = []
    model = Toy()

    def loss(micro: PackedBatch) -> SummedLoss:
        seen.append(micro.num_targets)
        return loss_of(model, micro)

    step(model, [Term(batch, loss)], budget=1)
    assert seen == [batch.num_targets]


def test_mistakes_of_the_caller_are_named() -> None:
    model = Toy()
    batch = toy_batch()
    nothing = replace(batch, mask_T=torch.zeros_like(batch.mask_T), target_counts=(0,) * len(batch.lengths))
    with pytest.raises(ValueError, match="without targets"):
        step(model, [Term(nothing, partial(loss_of, model))])
    with pytest.raises(ValueError, match="same name"):
        step(model, [Term(batch, partial(loss_of, model)), Term(batch, partial(loss_of, model))])

    def miscounts(micro: PackedBatch) -> SummedLoss:
        return replace(loss_of(model, micro), count=torch.tensor(micro.num_sequences))

    with pytest.raises(ValueError, match="counts 6 targets"):
        step(model, [Term(batch, miscounts)])
