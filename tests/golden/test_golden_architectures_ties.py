"""TIES over a whole model, and DARE, between architectures against the reference code of AdaMMS, element by element.

What the two do alike: they trim (or mask) each delta, elect a sign per entry by the plain sum, add up what agrees. What
they do not:

1. The reference rounds its deltas to a dtype of 8 or 11 bits first, and every sum; see test_golden_architectures.py,
   whose bound holds wherever both add up the same deltas: with z for a delta after trimming and rescaling,
     sum of |z' - z| over what agrees + hR(sum) + hE(result) + hT(result)
   where |z' - z| <= hR(d), and for DARE hR(d) / K + hR(d / K).
2. The reference's threshold is the magnitude of the (int(K n) + 1)-th largest, polymerge's that of the int(K n)-th;
   both keep all that reach it. Rounding is monotone, so the reference keeps whatever polymerge keeps, and what it keeps
   beyond that has a magnitude that rounds to the same number as the next one below.
3. Where the sum is zero polymerge elects plus, the reference the sign that the majority of the model's entries has;
   and where rounding makes a small sum zero or turns its sign, the election turns with it.

Nothing else: that is shown for each entry on which they differ, and the reference's values follow bit by bit from its
rounded deltas. For DARE polymerge's arithmetic is given the reference's masks, since the two draw differently.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import polymerge
from architecture_cases import CASES, Case, cases, exactly
from golden_cases import FLOAT32_STEPS, Bools, Floats, half_step, load
from layouts import same_bits
from polymerge.methods.dare import dare_linear, dare_ties

TIES, DARE = cases("ties"), cases("dare_linear", "dare_ties")
ELECTING = cases("ties", "dare_ties")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory):
    """The output of a case of TIES through the public path."""

    @cache
    def run(name: str) -> dict[str, Tensor]:
        folder = tmp_path_factory.mktemp("merged") / name
        return load(polymerge.merge(CASES[name].recipe(), folder, check=False, threads=2, block=1000).folder)

    return run


# --- the reference


def their_kept(case: Case) -> Bools:
    """What the reference keeps of each row: all that reach the magnitude of the (int(K n) + 1)-th largest."""
    if case.method != "ties":
        return case.masks
    sizes = case.rows().abs().float().numpy()
    rank = sizes.shape[1] - int(case.density * sizes.shape[1])
    return sizes >= np.partition(sizes, rank - 1, axis=1)[:, rank - 1 : rank]


def their_rows(case: Case) -> Tensor:
    """The reference's rows after trimming, or masking and rescaling, in its dtype."""
    kept = torch.from_numpy(their_kept(case))
    rows = case.rows() * kept.to(case.computed_in)
    return rows if case.method == "ties" else rows / case.density


def their_agreement(rows: Tensor) -> Bools:
    """Which entries the reference adds up: those of the sign of the sum; of the majority's where it is zero."""
    votes = torch.sign(rows.float().sum(0).to(rows.dtype))
    majority = torch.sign(votes.float().sum())
    votes[votes == 0] = majority.to(votes.dtype)
    return torch.where(votes > 0, rows > 0, rows < 0).numpy()


@pytest.mark.parametrize("name", [*TIES, *DARE])
def test_the_reference_follows_from_its_rounded_deltas_bit_by_bit(name: str) -> None:
    case = CASES[name]
    rows = their_rows(case)
    if case.method == "dare_linear":
        change = rows.float().mean(0).to(rows.dtype)
    else:
        agree = torch.from_numpy(their_agreement(rows))
        change = (rows * agree.to(rows.dtype)).float().sum(0).to(rows.dtype)
    for key, tensor in case.joined(change).items():
        assert same_bits(tensor, case.expected[key]), key


# --- polymerge


def our_kept(case: Case, deltas: Floats) -> Bools:
    """The int(K n) largest of each row, and what is equal to the least of them; for DARE the reference's masks."""
    if case.method != "ties":
        return case.masks
    sizes = np.abs(deltas)
    kept: Bools = sizes >= np.sort(sizes, axis=1)[:, -int(case.density * sizes.shape[1])][:, None]
    return kept


def our_rows(case: Case) -> Floats:
    """polymerge's rows after trimming, or masking and rescaling."""
    deltas = case.deltas()
    rows = np.where(our_kept(case, deltas), deltas, np.float32(0))
    return rows if case.method == "ties" else rows * np.float32(1 / case.density)


def our_agreement(rows: Floats) -> Bools:
    return np.where(rows[0] + rows[1] >= 0, rows > 0, rows < 0)


def base_of(case: Case) -> Floats:
    return np.concatenate([exactly(tensor) for tensor in case.of("base")]).astype(np.float32)


def as_written(case: Case, flat: Floats) -> dict[str, Tensor]:
    """A flat float32 vector as the template's tensors."""
    own = case.template
    return {k: torch.from_numpy(v).reshape(own[k].shape).to(own[k].dtype) for k, v in case.split(flat).items()}


@pytest.mark.parametrize("name", TIES)
def test_ties_is_the_literal_loop(merged, name: str) -> None:
    case, output = CASES[name], merged(name)
    rows = our_rows(case)
    parts = np.where(our_agreement(rows), rows, np.float32(0))
    for key, tensor in as_written(case, base_of(case) + (parts[0] + parts[1])).items():
        assert same_bits(output[key], tensor), key


def ours(case: Case, merged) -> Floats:
    """polymerge's result: of TIES through the public path, of DARE by its functions, on the reference's masks."""
    if case.method == "ties":
        return case.flat(merged(case.name))
    rows, keys = our_rows(case), [0, 1]
    if case.method == "dare_linear":
        change = dare_linear(rows, 1.0, 1.0, normalize=True, keys=keys)
    else:
        change = dare_ties(rows, 1.0, 1.0, True, "unweighted", "none", keys=keys)
    return case.flat(as_written(case, base_of(case) + change))


# --- one against the other


@pytest.mark.parametrize("name", TIES)
def test_the_reference_keeps_what_polymerge_keeps_and_what_rounds_to_the_next_one(name: str) -> None:
    case, beyond = CASES[name], 0
    deltas, rows = case.deltas(), case.rows().float().numpy()
    kept, theirs = our_kept(case, deltas), their_kept(case)
    count = int(case.density * deltas.shape[1])
    assert (kept.sum(axis=1) >= count).all()
    assert theirs[kept].all()
    for own, other, delta, rounded in zip(kept, theirs, deltas, rows, strict=True):
        following = np.argsort(-np.abs(delta), kind="stable")[count]
        extra = other & ~own
        assert (np.abs(rounded[extra]) == np.abs(rounded[following])).all()
        beyond += np.count_nonzero(extra)
    assert (
        beyond
        == {"owl_into_cog_ties_0.2": 69, "llava_into_owl_ties_0.2": 31, "onevision_into_qwen_ties_0.5": 271}[name]
    )


@pytest.mark.parametrize("name", ELECTING)
def test_elections_differ_only_where_the_sum_is_within_rounding_of_zero(name: str) -> None:
    case = CASES[name]
    mine, theirs = our_rows(case), their_rows(case)
    same_kept = ((mine != 0) == (theirs != 0).numpy()).all(axis=0)
    elected = (our_agreement(mine) == their_agreement(theirs)).all(axis=0)
    turned = same_kept & ~elected
    off = np.abs(mine.astype(np.float64) - theirs.double().numpy()).sum(axis=0)
    total = np.abs(mine.astype(np.float64).sum(axis=0))
    assert (total[turned] <= off[turned]).all()
    assert turned.any()
    assert np.count_nonzero(turned) < mine.shape[1] / 50


def bound(case: Case, agree: Bools) -> Floats:
    """How far the results may be apart where both add up the same."""
    mine, theirs = our_rows(case).astype(np.float64), their_rows(case).double().numpy()
    scale = 0.5 if case.method == "dare_linear" else 1.0
    deltas = case.deltas().astype(np.float64)
    share = 1.0 if case.method == "ties" else case.density
    off = np.stack([half_step(dtype, delta) for dtype, delta in zip(case.delta_types(), deltas, strict=True)])
    if case.method != "ties":
        off = off / share + half_step(case.computed_in, deltas / share + off / share)
    off = (off + FLOAT32_STEPS * np.abs(deltas) / share) * agree
    assert (np.abs(mine - theirs) * agree <= off).all()
    total = scale * (theirs * agree).sum(axis=0)
    base = base_of(case).astype(np.float64)
    found = scale * off.sum(axis=0) + half_step(case.computed_in, total)
    found += FLOAT32_STEPS * (np.abs(base) + np.abs(mine).sum(axis=0))
    for key, size in case.split(np.abs(base + total) + found).items():
        place = case.split(found)[key]
        place += half_step(case.expected[key].dtype, size) + half_step(case.template[key].dtype, size)
    return found


@pytest.mark.parametrize("name", [*TIES, *DARE])
def test_what_adds_up_the_same_is_within_the_reference_s_own_rounding(merged, name: str) -> None:
    case = CASES[name]
    mine, theirs = our_rows(case), their_rows(case)
    if case.method == "dare_linear":
        agree = same = mine != 0
        assert ((mine != 0) == (theirs != 0).numpy()).all()
        same = np.ones(mine.shape[1], bool)
    else:
        agree = our_agreement(mine)
        same = (agree == their_agreement(theirs)).all(axis=0)
    error = np.abs(ours(case, merged) - case.flat(case.expected)) / bound(case, agree)
    assert error[same].max() <= 1, (int(error.argmax()), float(error[same].max()))
    assert np.count_nonzero(same) > 0.98 * same.size
