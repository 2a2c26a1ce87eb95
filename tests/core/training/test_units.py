import pytest

from core.training import units


@pytest.mark.parametrize(
    ("values", "sds", "decimals"),
    [
        ([0.3813, 0.3926], [0.0016], 4),  # a spread that starts with 1 to 3 keeps two digits
        ([0.3813, 0.3926], [0.0072], 3),  # else one
        ([0.3813, 0.3926], [0.07], 3),  # but values never less than three
        ([0.311, 0.314], [0.0003, 0.004], 4),  # between the two spreads: neither 0.000 nor 0.00400
        ([0.3813], [0.0000001], 5),  # nor more than five
        ([0.3813], [], 4),
        ([1234.5], [20.0], 0),
        ([0.0], [], 3),
        ([87.4, 91.2], [0.0, 0.0], 2),  # no spread says as little as no value
    ],
)
def test_digits_follow_the_noise(values, sds, decimals):
    assert units.decimals_for(values, sds) == decimals


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.fixed(-0.01234, 3, sign=True), "−0.012"),
        (units.fixed(0.01234, 3, sign=True), "+0.012"),
        (units.fixed(-0.0001, 3), "0.000"),
        (units.fixed(None, 3), "–"),
        (units.count(0), "0"),
        (units.count(999), "999"),
        (units.count(999_900), "1.00 M"),
        (units.count(1_234_567, "FLOP"), "1.23 MFLOP"),
        (units.byte_size(0), "0 B"),
        (units.byte_size(1536), "1.50 KiB"),
        (units.byte_size(412e6), "393 MiB"),
        (units.duration(8.31), "8.31 s"),
        (units.duration(59.999), "60.0 s"),
        (units.duration(245), "4 min 05 s"),
        (units.duration(7800), "2 h 10 min"),
        (units.p_value(0.0004), "<0.001"),
        (units.p_value(0.0312), "0.031"),
        (units.ratio(30.5, 50), "0.61×"),
        (units.ratio(1, 0), "–"),
        (units.ratio(None, 1), "–"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected
