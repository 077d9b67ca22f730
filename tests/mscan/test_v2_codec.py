"""Checksums and the log2u16 code, against definitions that share nothing with them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyonn import _C
from tinyonn.errors import InputError

FLOAT_MAX = float(np.finfo(np.float32).max)
DENORMAL = float(np.float32(2.0**-149))
KNOWN = {  # RFC 3720, B.4, and the check value of the catalogue of CRC algorithms
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    b"": 0,
}


@pytest.fixture(params=["vector", "plain"])
def form(request: pytest.FixtureRequest):
    if request.param == "vector" and not _C.codec_is_vectorised():
        pytest.skip("this machine has no AVX2")
    _C.force_plain_codec(request.param == "plain")
    yield request.param
    _C.force_plain_codec(False)


@pytest.mark.parametrize("table", [False, True], ids=["instruction", "table"])
@pytest.mark.parametrize(("data", "value"), KNOWN.items(), ids=[repr(key)[:14] for key in KNOWN])
def test_crc32c_known_answers(data: bytes, value: int, table: bool) -> None:
    if not table and not _C.crc32c_is_hardware():
        pytest.skip("this CPU has no crc32c instruction")
    assert _C.crc32c(data, table) == value


@given(size=st.integers(0, 60_000), start=st.integers(0, 17), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_crc32c_instruction_equals_table(size: int, start: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, start + size, dtype=np.uint8)[start:]
    assert _C.crc32c(data) == _C.crc32c(data, force_table=True)


def bound(lo: float, hi: float) -> float:
    return float(np.log(2) * 0.51 * (hi - lo) / 65532 + 3e-7)


def check(values: np.ndarray) -> np.ndarray:
    codes, lo, hi = _C.encode_log2u16(values)
    decoded = _C.decode_log2u16(codes, lo, hi)
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(values))
    np.testing.assert_array_equal(np.isinf(decoded), np.isinf(values))
    np.testing.assert_array_equal(decoded == 0, values == 0)
    positive = np.isfinite(values) & (values > 0)
    if positive.any():
        wanted = values[positive].astype(np.float64)
        assert abs(lo - np.log2(wanted.min())) < 1e-12
        assert abs(hi - np.log2(wanted.max())) < 1e-12
        # A denormal result is rounded to a multiple of 2^-149.
        error = np.maximum(np.abs(decoded[positive] - wanted) - DENORMAL / 2, 0)
        assert (error <= bound(lo, hi) * wanted).all()
        assert decoded[positive].min() >= wanted.min()
        assert decoded[positive].max() <= wanted.max()
    return decoded


SPECIAL = st.sampled_from([0.0, -0.0, np.nan, np.inf, FLOAT_MAX, DENORMAL, 2.0**-126, 1.0, np.nextafter(np.float32(1), np.float32(2))])
NORM = st.floats(0, FLOAT_MAX, width=32)


@given(values=hnp.arrays(np.float32, st.integers(0, 100), elements=st.one_of(SPECIAL, NORM)))
@settings(deadline=None, max_examples=300)
def test_log2u16_keeps_its_bound(values: np.ndarray) -> None:
    decoded = check(values)
    _C.force_plain_codec(True)
    try:
        codes, lo, hi = _C.encode_log2u16(values)
    finally:
        _C.force_plain_codec(False)
    np.testing.assert_array_equal(_C.decode_log2u16(codes, lo, hi), decoded)


@pytest.mark.parametrize("spread", [1e-7, 1e-3, 1.0, 20.0, 43.0, 276.9], ids=lambda s: f"2^{s:g}")
def test_log2u16_bound_over_spreads(form: str, spread: float) -> None:
    rng = np.random.default_rng(0)
    values = np.exp2(np.clip(rng.uniform(-spread / 2, spread / 2, 20_001), -148.9, 127.9)).astype(np.float32)
    check(values)


def check_that_both_forms_agree(values: np.ndarray) -> None:
    if not _C.codec_is_vectorised():
        pytest.skip("this machine has no AVX2")
    vector = _C.encode_log2u16(values)
    _C.force_plain_codec(True)
    try:
        plain = _C.encode_log2u16(values)
    finally:
        _C.force_plain_codec(False)
    np.testing.assert_array_equal(vector[0], plain[0])
    assert vector[1:] == plain[1:]


@pytest.mark.parametrize("spread", [1e-7, 1.0, 43.0, 276.9], ids=lambda s: f"2^{s:g}")
def test_both_forms_give_the_same_codes(spread: float) -> None:
    rng = np.random.default_rng(2)
    values = np.exp2(np.clip(rng.uniform(-spread / 2, spread / 2, 100_000), -148.9, 127.9)).astype(np.float32)
    check_that_both_forms_agree(values)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("count", [31, 32, 33, 63, 64, 65, 2430])
def test_both_forms_agree_beside_special_values(count: int, share: float) -> None:
    """The vector form takes 32 values at once, the last ones twice, and looks at each only where one is special."""
    rng = np.random.default_rng(count)
    values = np.exp(rng.normal(-2, 3, count)).astype(np.float32)
    special = rng.random(count) < share
    values[special] = rng.choice(np.array([0.0, -0.0, np.nan, np.inf, DENORMAL, 99 * DENORMAL], np.float32), special.sum())
    check_that_both_forms_agree(values)


def test_log2u16_rounds_to_the_nearest_step(form: str) -> None:
    values = np.exp2(np.random.default_rng(1).uniform(-10, 10, 50_003)).astype(np.float32)
    codes, lo, hi = _C.encode_log2u16(values)
    exact = (np.log2(values.astype(np.float64)) - lo) * 65532 / (hi - lo) + 1
    assert np.abs(codes - exact).max() <= 0.51


@pytest.mark.parametrize("value", [FLOAT_MAX, DENORMAL, 3 * DENORMAL, 2.0**-126, 1.0, 1234.567, 0.1, 1e-13], ids=lambda v: f"{v:g}")
@pytest.mark.parametrize("count", [1, 19, 1000])
def test_a_constant_plane_is_exact(form: str, value: float, count: int) -> None:
    values = np.full(count, value, np.float32)
    codes, lo, hi = _C.encode_log2u16(values)
    np.testing.assert_array_equal(_C.decode_log2u16(codes, lo, hi), values)


def test_smallest_and_largest_are_exact_where_the_plane_is_wide(form: str) -> None:
    values = np.array([DENORMAL, FLOAT_MAX, 1.0, 0.0], np.float32)
    decoded = check(values)
    assert decoded[0] == values[0]
    assert decoded[1] == values[1]


@pytest.mark.parametrize(
    "values", [[], [0.0] * 40, [np.nan] * 40, [np.inf] * 40, [0.0, np.nan, np.inf]], ids=["none", "0", "NaN", "inf", "mixed"]
)
def test_a_plane_without_a_logarithm_is_exact(form: str, values: list[float]) -> None:
    array = np.array(values, np.float32)
    codes, lo, hi = _C.encode_log2u16(array)
    assert (lo, hi) == (0, 0)
    np.testing.assert_array_equal(_C.decode_log2u16(codes, lo, hi), array)


@pytest.mark.parametrize("value", [-1.0, -DENORMAL, -np.inf])
@pytest.mark.parametrize("place", [0, 8, 20])
def test_a_negative_norm_is_refused(form: str, value: float, place: int) -> None:
    values = np.ones(21, np.float32)
    values[place] = value
    with pytest.raises(InputError, match="must not be negative"):
        _C.encode_log2u16(values)


def test_every_code_decodes_to_its_value() -> None:
    codes = np.arange(65536, dtype=np.uint16)
    lo, hi = -40.25, 17.5
    decoded = _C.decode_log2u16(codes, lo, hi)
    wanted = np.exp2(lo + (codes[1:65534].astype(np.float64) - 1) * (hi - lo) / 65532).astype(np.float32)
    np.testing.assert_allclose(decoded[1:65534], wanted, rtol=6e-8)
    assert decoded[0] == 0
    assert np.isinf(decoded[65534])
    assert np.isnan(decoded[65535])
    assert (np.diff(decoded[1:65534]) >= 0).all()
