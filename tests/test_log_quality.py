"""What checks say of a log as a whole, among it whatever ingestion refuses."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from offrl_models import storage
from offrl_models.config import parse_pipeline
from offrl_models.logs.contract import Contract
from offrl_models.logs.coverage import measure
from offrl_models.logs.read import Log
from offrl_models.logs.rules import rules
from offrl_models.logs.screen import screen
from offrl_models.reports import quality
from tests.conftest import as_table, attributes, check_log, open_log
from tests.test_logs import BROKEN, WORLD, new_batch


@pytest.fixture
def contract() -> Contract:
    return parse_pipeline(attributes(WORLD.n_states, 3), "toy").logs


def test_a_clean_log_passes_every_check_and_the_pages_need_no_network(contract: Contract, tmp_path: Path) -> None:
    found = check_log(contract, pl.DataFrame(as_table(WORLD.simulate(500, seed=3))), tmp_path)
    assert set(found) == {name for name, check in quality.CHECKS.items() if "raw_logs" in check.assets}
    assert [name for name, result in found.items() if not result.passed] == []
    assert all((tmp_path / result.page).exists() for result in found.values())
    for page in (tmp_path / "coverage").rglob("*.html"):
        assert not any(
            mark in page.read_text() for mark in ('src="http', 'link rel="stylesheet" href="http', "url('http")
        )


@pytest.mark.parametrize("name", sorted(set(BROKEN) - {"missing column", "wrong type", "empty"}))
def test_great_expectations_sees_what_ingestion_sees(contract: Contract, name: str, tmp_path: Path) -> None:
    """A log that got past ingestion in some other way is still blocked by the suite."""
    spoil, expected = BROKEN[name]
    found = check_log(contract, spoil(new_batch()), tmp_path)
    blocked = {result.check for result in found.values() if result.blocking and not result.passed}
    assert any(f"({check})" in expected.replace("\\", "").replace("[45]", "5") for check in blocked), blocked


def test_a_log_of_one_action_has_nothing_to_compare(contract: Contract, tmp_path: Path) -> None:
    log = dataclasses.replace(WORLD, behavior=np.eye(3)[np.zeros(WORLD.n_states, int)]).simulate(300, seed=3)
    found = check_log(contract, pl.DataFrame(as_table(log)), tmp_path)
    assert not found["C24"].passed and not found["C24"].blocking
    assert found["C24"].sentence == f"all {log.n_rows} rows have the same action: there is nothing to compare it with"


def test_constant_rewards_warn_and_thin_coverage_is_remarked(contract: Contract, tmp_path: Path) -> None:
    log = pl.DataFrame(as_table(WORLD.simulate(30, seed=3)))
    found = check_log(contract, log.with_columns(reward=pl.lit(0.0)), tmp_path)
    assert not found["C12"].passed and not found["C12"].blocking
    assert not found["C21"].passed and not found["C21"].blocking


def test_measures_do_not_depend_on_the_order_of_rows(contract: Contract, tmp_path: Path) -> None:
    log = pl.DataFrame(as_table(WORLD.simulate(100, seed=3)))
    first = measure(open_log(contract, log, tmp_path))
    second = measure(open_log(contract, log.sample(fraction=1.0, shuffle=True, seed=0), tmp_path))
    assert first.batches.equals(second.batches) and first.cells.equals(second.cells)
    assert first.card == second.card
    assert first.violations == second.violations == ()


def test_every_rule_is_tripped_by_one_of_these_batches(contract: Contract, tmp_path: Path) -> None:
    tripped = set()
    for name in set(BROKEN) - {"missing column", "wrong type", "empty"}:
        found = screen(open_log(contract, BROKEN[name][0](new_batch()), tmp_path))
        tripped |= {violation.check for violation in found.violations}
    assert tripped == {rule.check for rule in rules(contract)} | {"C03", "C04", "C05"}


def test_string_ids_and_dictionary_columns_are_read(contract: Contract, tmp_path: Path) -> None:
    table = as_table(WORLD.simulate(20, seed=3))
    names = pa.array([f"stay {i}" for i in table["episode"].to_pylist()]).dictionary_encode()
    storage.write_parquet(tmp_path / "b.parquet", table.set_column(0, "episode", names))
    log = Log.open([tmp_path / "b.parquet"], contract)
    assert log.frame(["episode"])["episode"].dtype == pl.String and screen(log).violations == ()


def test_choices_that_were_sure_warn_and_forced_ones_do_not(contract: Contract, tmp_path: Path) -> None:
    """C18: three in ten choices drawn with certainty; where only one action is allowed there is no choice."""
    log = pl.DataFrame(as_table(WORLD.simulate(400, seed=3)))
    sure = pl.int_range(pl.len()) % 10 < 3
    found = check_log(contract, log.with_columns(prob=pl.when(sure).then(0.9999).otherwise("prob")), tmp_path)
    assert not found["C18"].passed and not found["C18"].blocking
    assert found["C18"].sentence.startswith(
        "30.1% of the choices of version 'all' were drawn with a propensity over .999"
    )
    taken = pl.concat_list([pl.col("action") == action for action in range(3)]).list.to_array(3)
    forced = pl.when(sure).then(taken).otherwise("allowed")
    certain = pl.when(sure).then(1.0).otherwise("prob")
    assert check_log(contract, log.with_columns(allowed=forced, prob=certain), tmp_path)["C18"].passed


def test_a_log_with_many_open_episodes_is_blocked(contract: Contract, tmp_path: Path) -> None:
    """C06: each of them is acceptable, 5% of them are not."""
    log = pl.DataFrame(as_table(WORLD.simulate(400, seed=3)))
    goes_on = log["episode"].is_in(range(20)) & log["terminated"]
    found = check_log(contract, log.with_columns(terminated=pl.col("terminated") & ~goes_on), tmp_path)
    assert not found["C06"].passed and found["C06"].blocking
    assert found["C06"].sentence.startswith("5.0% of the episodes are open")
