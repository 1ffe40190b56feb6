"""The losses over a group are one process's on the whole batch; what is sent, and what an error in one process does."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from group_cases import (
    F64_CASE,
    ONE_OF_EACH_FAMILY,
    assert_exact,
    assert_same_direction_and_size,
    equal,
    forced,
    share,
    shared_loss,
    unequal,
)
from oracle import (
    BACKENDS,
    BF16,
    F16,
    F32,
    F64,
    Case,
    Run,
    assert_within_budget,
    bf16_rounding,
    items,
    loss_of,
    naive,
    pair_scores,
    parts,
    reductions,
    upstream_of,
    varied,
)

import dimkern
from dimkern import distributed, grouped, streaming
from dimkern.estimators import REGISTRY
from dimkern.plan import format_bytes

VARIANTS = [
    {},
    {"clip": 1.5},
    {"self_mask": "exclude", "P": 1, "m_layout": "NK"},
    {"l_layout": "transposed", "m_layout": "strided"},
    {"l_layout": "width_slice", "L": 9},
    {"l_layout": "channels_last", "L": 1},
    {"l_layout": "image_slice", "scale": -0.4},
]
ROWS, COLUMNS = "rows outside", "columns outside"
BLOCKS = {  # by whether the estimator is pointwise
    False: [
        {"order": ROWS, "row_images": 2},
        {"order": ROWS, "row_images": 3, "col_images": 1},
        {"order": COLUMNS, "row_images": 2, "col_images": 2},
    ],
    True: [{"order": COLUMNS, "row_images": 2}, {"order": COLUMNS, "row_images": 3, "col_images": 1}],
}


def case_every_estimator():
    for estimator in REGISTRY:
        for backend in BACKENDS:
            for counts in (equal(), unequal()):
                for variant in VARIANTS:
                    assert_exact(estimator, varied(F64_CASE, **variant), counts, backend)


def case_every_block_and_order():
    """Blocks that hold none, some or all of a process's own rows, in both loop orders."""
    for estimator in ONE_OF_EACH_FAMILY:
        for backend in BACKENDS:
            for blocks in BLOCKS[REGISTRY[estimator].family == "pointwise"]:
                for changes in ({}, {"clip": 1.5, "l_layout": "width_slice"}):
                    with forced(**blocks):
                        assert_exact(estimator, varied(F64_CASE, **changes), unequal(), backend)
                        assert_exact(estimator, varied(F64_CASE, **changes), equal(3), backend)


def case_pair_mlp():
    """The concat critic: loss, gradients of both inputs and of all its weights, which DDP averages."""
    world = dist.get_world_size()
    for estimator in REGISTRY:
        for counts in (equal(), unequal()):
            for clip, blocks in ((None, {}), (1.5, {"row_images": 2, "col_images": 1})):
                case = varied(F64_CASE, N=sum(counts))
                torch.manual_seed(1)
                critic = dimkern.PairMLPCritic(7, hidden=5, dtype=F64)
                l, m, scale = case.tensors()
                keywords = {"scale": scale, "critic": critic, "clip": clip}
                expected = loss_of(estimator, l, m, backend="reference", **keywords)
                grads = torch.autograd.grad(expected, (l, m, scale, *critic.parameters()))
                mine = share(l, counts), share(m, counts), scale, *critic.parameters()
                with forced(**blocks):
                    loss = loss_of(estimator, *mine[:2], group=dist.group.WORLD, **keywords)
                torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
                for i, (got, whole) in enumerate(zip(torch.autograd.grad(loss, mine), grads, strict=True)):
                    if i < 2:
                        assert_same_direction_and_size(f"{estimator}: {i}", got / world, share(whole, counts))
                    else:
                        dist.all_reduce(got)
                        assert_same_direction_and_size(f"{estimator}: {i}", got / world, whole)


def case_extreme_scores():
    """Scores of 1e4 and rows whose negatives are all on other processes."""
    for estimator in ("infonce", "dv", "jsd"):
        for scale in (1e3, -1e3):
            case = varied(F64_CASE, scale=scale, N=sum(unequal()))
            loss, leaves = shared_loss(estimator, case, unequal())
            oracle = naive(estimator, case)
            torch.testing.assert_close(loss.detach(), oracle.loss, rtol=1e-12, atol=1e-9)
            assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(loss, leaves))


def case_lower_precision():
    """Within the error budget that one process is held to; worlds whose size is a power of two divide exactly."""
    world = dist.get_world_size()
    if world == 3:
        return
    for dtype in (F32, BF16, F16):
        for estimator in REGISTRY:
            for backend in BACKENDS:
                for counts in (equal(3), unequal()):
                    case = Case(N=sum(counts), P=2, l_dtype=dtype, m_dtype=dtype)
                    loss, leaves = shared_loss(estimator, case, counts, backend)
                    upstream = upstream_of(case, loss.shape).to(loss.dtype)
                    grads = [x / world for x in torch.autograd.grad(loss, leaves, upstream)]
                    everyone = [None] * world
                    dist.all_gather_object(everyone, grads)
                    of_l, of_m, of_scale = zip(*everyone, strict=True)
                    whole = {"l": torch.cat(of_l), "m": torch.cat(of_m), "s": torch.stack(of_scale).sum(0)}
                    rounding = bf16_rounding(estimator, case, backend)
                    assert_within_budget(estimator, case, Run(loss.detach(), whole, rounding))


def case_parts_and_reductions():
    """Parts are those of the whole batch on every process; "none" gives a process its own rows' items."""
    for estimator in REGISTRY:
        for reduction in reductions(estimator):
            for counts in (equal(), unequal()):
                case = varied(F64_CASE, N=sum(counts), reduction=reduction)
                got, _ = shared_loss(estimator, case, counts, return_parts=True)
                l, m, scale = (x.detach() for x in case.tensors())
                s = pair_scores(l, m, scale, None, F64)
                losses = items(estimator, s, case.self_mask)
                expected = {"mean": losses.mean, "sum": losses.sum, "none": lambda: share(losses, counts)}[reduction]()  # noqa: B023
                torch.testing.assert_close(got.loss.detach(), expected, rtol=1e-11, atol=1e-11)
                torch.testing.assert_close(
                    got[1:], parts(estimator, s, case.self_mask), rtol=1e-11, atol=1e-11, equal_nan=True
                )


def case_items_have_the_gradient_of_their_sum_over_processes():
    """reduction="none" with weights of one's own: what one process gets that weighs all items so."""
    for estimator in REGISTRY:
        if "none" not in reductions(estimator):
            continue
        for backend in BACKENDS:
            for counts in (equal(), unequal()):
                case = varied(F64_CASE, N=sum(counts), reduction="none", clip=2.0)
                oracle = naive(estimator, case)
                loss, leaves = shared_loss(estimator, case, counts, backend)
                whole = (sum(counts), *loss.shape[1:])
                grads = torch.autograd.grad(loss, leaves, share(upstream_of(case, whole), counts))
                for name, got in zip("lm", grads, strict=False):
                    assert_same_direction_and_size(f"{estimator}: {name}", got, share(oracle.grads[name], counts))
                by_scale = grads[2].clone()
                dist.all_reduce(by_scale)
                assert_same_direction_and_size(f"{estimator}: scale", by_scale, oracle.grads["s"])


def case_forward_only():
    """Without gradients anywhere: the same loss, and no product for a gradient."""
    for estimator in REGISTRY:
        case = varied(F64_CASE, N=sum(unequal()))
        with torch.no_grad(), mock.patch.multiple(streaming, _rows_outside=None, _one_sweep=None, differentiate=None):
            loss, _ = shared_loss(estimator, case, unequal())
        torch.testing.assert_close(loss, naive(estimator, case).loss, rtol=1e-12, atol=1e-12)
        assert not loss.requires_grad


def case_a_process_that_needs_no_gradient():
    """It takes part in every collective; the others get theirs."""
    rank, counts = dist.get_rank(), unequal()
    for estimator in ONE_OF_EACH_FAMILY:
        case = varied(F64_CASE, N=sum(counts), needs="lms" if rank == 0 else "")
        loss, leaves = shared_loss(estimator, case, counts)
        torch.testing.assert_close(loss.detach(), naive(estimator, varied(case, needs="lms")).loss)
        if rank == 0:
            oracle = naive(estimator, varied(case, needs="lms"))
            grads = torch.autograd.grad(loss, leaves[:2], upstream_of(case, ()))
            for name, got in zip("lm", grads, strict=True):
                assert_same_direction_and_size(name, got / len(counts), share(oracle.grads[name], counts))


def case_subgroups():
    """Two groups at once, each a batch of its own; a process outside of a group is told so, the members do not wait."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world < 3:
        return
    parts_of = [[0, 2], [1, 3]] if world == 4 else [[0, 2], [1]]
    groups = [dist.new_group(ranks) for ranks in parts_of]
    mine = groups[rank % 2]
    if dist.get_world_size(mine) > 1:
        for estimator in ONE_OF_EACH_FAMILY:
            assert_exact(estimator, varied(F64_CASE, seed=rank % 2), [2, 3], group=mine)
    with expected_error(ValueError, "is not in"):
        dimkern.infonce_loss(torch.ones(2, 3, 4), torch.ones(2, 3), group=groups[1 - rank % 2])
    with expected_error(TypeError, "group is a str"):
        dimkern.infonce_loss(torch.ones(2, 3, 4), torch.ones(2, 3), group="world")


def case_the_loss_may_be_changed_in_place():
    """As loss /= 2 of an accumulating loop does; no other number that the call returned changes with it."""
    torch.manual_seed(1)
    critic = dimkern.PairMLPCritic(7, hidden=5, dtype=F64)
    for changes, keywords in (({}, {}), ({"reduction": "sum"}, {}), ({}, {"critic": critic})):
        case, gradients = varied(F64_CASE, N=sum(unequal()), **changes), []
        for factor in (1, 2):
            got, leaves = shared_loss("infonce", case, unequal(), return_parts=True, **keywords)
            loss, before = got.loss, [float(x.detach()) for x in got]
            loss /= factor
            assert [float(x.detach()) * (factor if i == 0 else 1) for i, x in enumerate(got)] == before
            gradients.append(torch.autograd.grad(loss, leaves))
        for one, half in zip(*gradients, strict=True):
            assert torch.equal(one / 2, half)


@contextlib.contextmanager
def expected_error(kind, text):
    caught = None
    try:
        yield
    except kind as error:
        caught = str(error)
    assert caught is not None, f"no {kind.__name__}"
    assert text in caught, f"{text!r} is not in {caught}"


def case_disagreement_is_an_error_everywhere():
    """Whatever one process has differently, every process says so, and the group goes on."""
    if dist.get_world_size() == 1:
        return
    last = dist.get_rank() == dist.get_world_size() - 1
    l, m = torch.randn(2, 6, 5), torch.randn(2, 6)
    for name, (other_l, other_m, keywords) in {
        "disagree on critic": (l, m, {"critic": dimkern.PairMLPCritic(6, hidden=5)}),
        "disagree on K": (l[:, :4], m[:, :4], {}),
        "disagree on L": (l[:, :, :3], m, {}),
        "disagree on P": (l, m[..., None].expand(2, 6, 2), {}),
        "disagree on the dtype of l": (l.double(), m, {}),
        "disagree on the dtype of m": (l, m.bfloat16(), {}),
        "disagree on clip": (l, m, {"clip": 3.0}),
        "disagree on self_mask": (l, m, {"self_mask": "exclude"}),
        "disagree on reduction": (l, m, {"reduction": "sum"}),
        "disagree on scale": (l, m, {"scale": 0.5}),
        "disagree on the loss": (l, m, {"loss": "JSD"}),
    }.items():
        arguments = (other_l, other_m) if last else (l, m)
        estimator = (keywords if last else {}).pop("loss", "infonce").lower()
        with expected_error(dimkern.GroupError, name):
            loss_of(estimator, *arguments, group=dist.group.WORLD, **(keywords if last else {}))
    assert_exact("infonce", F64_CASE, equal())


def case_bad_input_is_an_error_everywhere():
    """The process with the bad input gets its own error, the others hear of it."""
    if dist.get_world_size() == 1:
        return
    last = dist.get_rank() == dist.get_world_size() - 1
    l, m = torch.randn(2, 6, 5), torch.randn(2, 6)
    for bad, kind, text in (
        ((l[:0], m[:0]), ValueError, "which is empty"),
        ((l, m[:, :3]), ValueError, "disagree on K"),
        ((l.int(), m), TypeError, "int32"),
        ((None, m), TypeError, "NoneType"),
    ):
        with expected_error(kind if last else dimkern.GroupError, text):
            dimkern.infonce_loss(*(bad if last else (l, m)), group=dist.group.WORLD)
    for keywords in (
        {"reduction": "each"},
        {"negatives": "roll"},
        {"backend": "none"},
        {"clip": -1.0},
        {"backend": "reference"},
    ):
        name, value = next(iter(keywords.items()))
        with expected_error(ValueError if last else dimkern.GroupError, name):
            dimkern.infonce_loss(l, m, group=dist.group.WORLD, **{name: value} if last else {})
    for call in (dimkern.infonce_loss, dimkern.explain):
        with expected_error(ValueError, "with a critic over a group"):
            call(l, m, critic=dimkern.PairMLPCritic(6, hidden=5), reduction="none", group=dist.group.WORLD)
    with expected_error(ValueError, "memory_budget"), dimkern.config(memory_budget=100):
        dimkern.infonce_loss(l, m, group=dist.group.WORLD)
    assert_exact("infonce", F64_CASE, equal())


class Failing:
    """Tiles whose `weigh` or `sweep` fails on one process when its turn comes."""

    def __init__(self, at):
        self.at, self.choose = at, grouped.ops._tiles

    def __call__(self, *arguments):
        tiles, turns = self.choose(*arguments), iter(range(100))

        def fail(original):
            def step(*arguments):
                if next(turns) == self.at and dist.get_rank() == 1:
                    raise MemoryError("no memory for this block")
                return original(*arguments)

            return step

        for name in ("weigh", "sweep", "measure"):
            setattr(tiles, name, fail(getattr(tiles, name)))
        return tiles


def case_a_failure_in_a_block_reaches_everyone():
    """One process runs out of memory between two collectives: all raise, nobody waits, and the group goes on."""
    if dist.get_world_size() == 1:
        return
    for estimator in ONE_OF_EACH_FAMILY:
        for at in range(3):
            for reduction in sorted({"mean", reductions(estimator)[-1]}):
                case = varied(F64_CASE, N=sum(unequal()), reduction=reduction)
                kind = MemoryError if dist.get_rank() == 1 else dimkern.GroupError
                failing = mock.patch.object(grouped.ops, "_tiles", Failing(at))
                with forced(row_images=1), failing, expected_error(kind, "no memory for this block"):
                    loss, _ = shared_loss(estimator, case, unequal())
                    loss.backward(torch.ones_like(loss))
                assert_exact(estimator, F64_CASE, equal())


@contextlib.contextmanager
def counted(calls):
    """Appends (collective, bytes of its input, bytes of its output) for whatever torch.distributed is asked to do."""
    size = lambda x: x.numel() * x.itemsize  # noqa: E731

    def watch(name, original):
        def call(*tensors, **options):
            calls.append((name, size(tensors[-1]), size(tensors[0])))
            return original(*tensors, **options)

        return call

    with contextlib.ExitStack() as stack:
        for module, name in ((dist, "all_reduce"), (distributed, "_all_gather"), (distributed, "_reduce_scatter")):
            stack.enter_context(mock.patch.object(module, name, watch(name.strip("_"), getattr(module, name))))
        yield


def case_collectives_and_bytes():
    """Two exchanges, one gather, one scatter, the rows' statistics: no more, and nothing that grows with L·K."""
    world = dist.get_world_size()
    if world == 1:
        return
    message, P, K, item = 256, 2, 7, 4
    for counts in (equal(3), unequal()):
        N, most = sum(counts), max(counts)
        for estimator, row_blocks in (("infonce", 1), ("infonce", 3), ("dv", 1), ("dv", 3), ("jsd", 1)):
            rows = [-(-N // row_blocks)] * (N // -(-N // row_blocks)) + [N % -(-N // row_blocks)]
            rows = [n for n in rows if n]
            statistics = {
                # maximum and sum of each row, then what its positives make of them
                "infonce": [8 * n * P for n in rows for _ in range(3)],
                "dv": [8, 8],
                "jsd": [8 * N * P],
            }[estimator]
            parts_of_the_loss = 4 * 8
            for needs in ("lms", ""):
                calls = []
                case = Case(N=N, P=P, L=50, K=K, needs=needs)
                with counted(calls), forced(row_images=rows[0]):
                    loss, _ = shared_loss(estimator, case, counts)
                    if needs:
                        loss.backward()
                reduced = [sent for name, sent, _ in calls if name == "all_reduce"]
                if needs:
                    assert sorted(reduced) == sorted([*statistics, parts_of_the_loss]), (estimator, rows, reduced)
                elif estimator == "infonce":  # without a gradient nobody needs the positives' statistic
                    assert sorted(reduced) == sorted([8 * N * P] * 2 + [parts_of_the_loss]), reduced
                gathered = [sent for name, sent, _ in calls if name == "all_gather"]
                assert gathered == [message, most * P * K * item, message]
                scattered = [(sent, got) for name, sent, got in calls if name == "reduce_scatter"]
                assert scattered == ([(world * most * P * K * item, most * P * K * item)] if needs else [])
                if estimator == "infonce" and needs and counts == equal(3):
                    summaries = gathered[1] + scattered[0][1]
                    features = 2 * most * 50 * K * item  # gathering them, and scattering their gradient
                    assert features == 50 / P * summaries


def case_explain_counts_what_is_sent():
    """Collectives and bytes of a call and its backward, as they are made."""
    if dist.get_world_size() == 1:
        return
    critic = dimkern.PairMLPCritic(7, hidden=5)
    for estimator in ONE_OF_EACH_FAMILY:
        for reduction in reductions(estimator):
            # the dot critic also with room for blocks of a few rows and columns only
            for keywords, budget in (({}, 2**28), ({}, 20_000), ({"critic": critic}, 2**28)):
                if reduction == "none" and keywords:
                    continue
                for needs in ("lm", ""):
                    calls, case = [], Case(N=sum(equal(3)), P=2, L=50, K=7, needs=needs, reduction=reduction)
                    with counted(calls), torch.set_grad_enabled(bool(needs)), dimkern.config(memory_budget=budget):
                        loss, (l, m, scale) = shared_loss(estimator, case, equal(3), **keywords)
                        if needs:
                            loss.sum().backward()
                        said = dimkern.explain(
                            l, m, loss=estimator, scale=scale, reduction=reduction, group=dist.group.WORLD, **keywords
                        )
                    if budget == 20_000 and reduction == "mean":
                        assert "blocks: 1 of" not in said or " x 1 of" not in said, said
                    total = format_bytes(sum(sent for _, sent, _ in calls))
                    assert f"make {len(calls)} collectives, to which a process contributes {total}" in said, said


def case_memory_does_not_grow_with_the_world():
    """Beyond summaries that are gathered, a process allocates what the plan said for its own share of the columns."""
    from test_memory import peak_of

    world = dist.get_world_size()
    if world == 1:
        return
    for estimator in ONE_OF_EACH_FAMILY:
        for backend in BACKENDS:
            plans = []
            choose = grouped.plan_for
            with mock.patch.object(grouped, "plan_for", lambda *a: plans.append(choose(*a)) or plans[-1]):  # noqa: B023
                case = Case(N=8 * world, P=1, L=20, K=16, l_layout="transposed")
                most, _ = peak_of(lambda: shared_loss(estimator, case, equal(8), backend)[0])  # noqa: B023
            summaries = 8 * world * 16 * 4
            mine = 8 * 20 * 16 * 4
            batch = 8 * world * (20 + 1) * 16 * (4 + 8)  # that the case draws
            assert most <= batch + plans[0].scratch + mine + 4 * summaries + 256 * world * 4 + 20_000
