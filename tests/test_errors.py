import inspect

from megalite import errors
from megalite.errors import MegaliteError


def test_every_kind_of_error_has_an_exit_code_of_its_own():
    kinds = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, MegaliteError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes == {
        "MegaliteError": 1,
        "ConfigError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "ResourceError": 5,
        "Preempted": 75,
    }


def test_codes_can_be_told_from_those_of_shells_and_signals():
    assert errors.EXIT_OK == 0
    # 75 is EX_TEMPFAIL of sysexits.h: it means that the same command is to be run again.
    assert all(0 < kind.exit_code < 64 or kind is errors.Preempted for kind in MegaliteError.__subclasses__())


def test_no_message_tells_the_password_of_a_url():
    assert str(errors.DataError("https:/me:CANARY@host/x is not a store")) == "https:/***@host/x is not a store"
