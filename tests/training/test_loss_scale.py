from dovetail.training.loss_scale import LossScaler


def test_the_scale_halves_on_overflow_down_to_one() -> None:
    scaler = LossScaler(scale=4.0)
    assert [scaler.record_overflow() for _ in range(4)] == [True, True, False, False]
    assert scaler.scale == 1.0


def test_the_scale_doubles_after_enough_finite_steps_in_a_row() -> None:
    scaler = LossScaler(scale=8.0, growth_interval=3)
    for _ in range(2):
        scaler.record_finite()
    scaler.record_overflow()
    for _ in range(2):
        scaler.record_finite()
    assert scaler.scale == 4.0
    scaler.record_finite()
    assert scaler.scale == 8.0


def test_a_restored_scaler_goes_on_where_it_was() -> None:
    one, other = LossScaler(growth_interval=4), LossScaler(growth_interval=4)
    one.record_overflow()
    for _ in range(3):
        one.record_finite()
    other.load_state_dict(one.state_dict())
    for scaler in (one, other):
        scaler.record_finite()
    assert one == other
    assert other.scale == 2.0**16
