"""A rank's place, as the environment tells it."""

import pytest
from nmoe.cli.errors import UsageError
from nmoe.cli.place import LIFELINE, place_of

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_without_a_rank_there_is_no_place():
    assert place_of({}, 4) is None
    assert place_of({"MASTER_ADDR": "host", "LOCAL_RANK": "0"}, 4) is None, "clusters set some of the names for all"


def test_torchruns_variables_are_read():
    place = place_of(TORCHRUN, 4)
    assert (place.rank, place.local_rank, place.size, place.address, place.port) == (3, 1, 4, "host", 29500)
    assert place.serves
    assert place.lifeline is None
    assert not place_of({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, 4).serves


def test_of_all_that_is_checked_only_the_first_process_trusts_nobody():
    def trusts(rank, **more):
        return place_of({**TORCHRUN, "RANK": str(rank), **more}, 4).trusts

    assert [trusts(rank) for rank in range(3)] == [False, True, True]
    assert trusts(0, **{LIFELINE: "5"}), "who started it has checked"


def test_another_number_of_ranks_than_configured_is_refused():
    with pytest.raises(UsageError, match=r"WORLD_SIZE=4 .* runtime.world_size = 2.*--set runtime.world_size=4"):
        place_of(TORCHRUN, 2)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name):
    with pytest.raises(UsageError, match=f"expected {name} beside RANK"):
        place_of({key: value for key, value in TORCHRUN.items() if key != name}, 4)


def test_a_number_that_is_none_is_named():
    with pytest.raises(UsageError, match="MASTER_PORT, found 'http'"):
        place_of({**TORCHRUN, "MASTER_PORT": "http"}, 4)
