"""Site files: the shipped ones load, mistakes name line and remedy, and each field's meaning is what sbatch and the ranks get."""

from pathlib import Path

import pytest
import yaml

from dqtrain.errors import ConfigError
from launch.site import Site, load_site

SITES = Path(__file__).resolve().parents[2] / "slurm" / "sites"


@pytest.fixture
def site(tmp_path: Path):
    def load(text: str) -> Site:
        (tmp_path / "site.yaml").write_text(text)
        return load_site(tmp_path / "site.yaml")

    return load


@pytest.mark.parametrize("path", sorted(SITES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_site_loads(path: Path) -> None:
    assert load_site(path).time is not None


def test_the_example_is_complete_and_says_the_defaults() -> None:
    text = (SITES / "example.yaml").read_text()
    fields = yaml.safe_load(text)
    assert set(fields) == set(Site.model_fields)
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if key in Site.model_fields and key != "gpus_per_node":
            default = Site.model_fields[key].get_default()
            said = yaml.safe_load(rest.partition("#")[2].split(";")[0].split(":")[0])
            assert said == (list(default) if isinstance(default, tuple) else default), line


@pytest.mark.parametrize(
    "text, ranks, signal_s, variables",
    [
        ("gpus_per_node: 0", 1, 180, {"OMP_NUM_THREADS": "1"}),
        ("{gpus_per_node: 8, cpus_per_rank: 12, grace_s: 30}", 8, 90, {"OMP_NUM_THREADS": "12"}),
        ("{gpus_per_node: 8, ranks_per_node: 4}", 4, 180, {"OMP_NUM_THREADS": "1"}),
        ("{gpus_per_node: 0, ranks_per_node: 2}", 2, 180, {"OMP_NUM_THREADS": "1"}),
        (
            "{gpus_per_node: 0, interface: ib0, environment: {OMP_NUM_THREADS: '3', A: b c}}",
            1,
            180,
            {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0", "A": "b c"},
        ),
    ],
)
def test_what_follows_from_a_site(site, text: str, ranks: int, signal_s: int, variables: dict[str, str]) -> None:
    found = site(text)
    assert (found.ranks, found.signal_s, found.variables) == (ranks, signal_s, variables)


@pytest.mark.parametrize(
    "text, message",
    [
        ("partition: gpu", "site.yaml:1: gpus_per_node: missing. Add it."),
        ("gpus_per_node: 8\npartion: gpu", "site.yaml:2: partion: unknown key. Did you mean `partition`?"),
        ("gpus_per_node: 8\ngpus_per_node: 4", "site.yaml:2: gpus_per_node: given twice"),
        ("gpus_per_node: -1", "site.yaml:1: gpus_per_node: is -1, but input should be greater than or equal to 0."),
        ("gpus_per_node: 8\nranks_per_node: 9", "ranks_per_node is 9, but there are 8 GPUs per node; give each rank a GPU."),
        ("gpus_per_node: 8\ngpu: h1000", "gpu is h1000, but `dqtrain plan` knows b200, h200, h100"),
        ("gpus_per_node: 0\ngpu: h100", "gpu is h100, but gpus_per_node is 0; set gpus_per_node, or gpu to null."),
        ("gpus_per_node: 0\npartition: 'a b'", "site.yaml:2: partition: is \"a b\", but string should match pattern"),
        ("gpus_per_node: 0\nmemory: 3 GB", "site.yaml:2: memory: is \"3 GB\", but string should match pattern"),
        ("gpus_per_node: 0\nenvironment: {OMP_NUM_THREADS: 3}", "site.yaml:2: environment.OMP_NUM_THREADS: is 3, but input should be a valid string."),
        ("gpus_per_node: 0\nkeep_environment: ['A,B']", "keep_environment.0: is \"A,B\", but string should match pattern"),
        ("gpus_per_node: 0\ntime: 1440", "site.yaml:2: time: is 1440, but input should be a valid string."),
        ("gpus_per_node: 0\ntime: 24h", "time is `24h`, but must be [DAYS-]HOURS:MINUTES:SECONDS, such as 24:00:00."),
        ("gpus_per_node: 0\ntime: 0:90:00", "time is `0:90:00`, but must be"),
        ("gpus_per_node: 0\ngrace_s: 100\ntime: 0:03:39", "time is 0:03:39, 219 s, of which the last 160 are for saving (grace_s 100 and 60 of slack); give 220 s or more"),
        ("gpus_per_node: 0\nflags: [-C gpu]", "flags holds `-C gpu`, but each must be --NAME or --NAME=VALUE, such as --constraint=a100."),
        ("gpus_per_node: 0\nflags: [--nodes=3]", "flags holds `--nodes=3`, but --nodes is a flag that dqtrain sets itself"),
        ("gpus_per_node: 0\nflags: [--mail-user=me]", "--mail-user is a flag that dqtrain sets itself"),
        ("gpus_per_node: 0\nmail: {address: me@x, events: [DONE]}", "site.yaml:2: mail.events.0: is \"DONE\", but input should be 'BEGIN', 'END'"),
        ("gpus_per_node: 0\nmail: {address: me@x, events: []}", "site.yaml:2: mail.events: is [], but "),
        ("gpus_per_node: 0\ncontainer: {kind: docker, image: /a}", "container.kind: is \"docker\", but input should be 'pyxis' or 'apptainer'."),
        ("gpus_per_node: 0\ncontainer: {kind: pyxis, image: /a b}", "container.image: is \"/a b\", but string should match pattern"),
        ("gpus_per_node: 0\ncontainer: {kind: pyxis, image: a.sqsh}", "image is a.sqsh, but must be an absolute path, or docker://..."),
        ("gpus_per_node: 0\ncontainer: {kind: apptainer, image: docker://a}", "make a file of it, `apptainer pull IMAGE.sif docker://a`, and name that."),
        ("gpus_per_node: 0\ncontainer: {kind: pyxis, image: /a, mounts: [data]}", "container.mounts.0: is \"data\", but string should match pattern"),
        ("gpus_per_node: 0\ncontainer: {kind: pyxis, image: /a, mounts: ['/a:/b:rx']}", "container.mounts.0: is \"/a:/b:rx\", but"),
        ("- a", "site.yaml:1: holds list, but must be a mapping with keys such as `gpus_per_node:`. Give a site file, such as slurm/sites/example.yaml."),
    ],
)  # fmt: skip
def test_mistakes_name_line_and_remedy(site, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        site(text)
    assert message in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: cannot be read .* Give the path of a site file, such as slurm/sites/example.yaml"):
        load_site(tmp_path / "none.yaml")


@pytest.mark.parametrize("limit", ["0:03:40", "00:04:00", "1-00:00:00", "100:00:00"])
def test_time_limits_that_can_be(site, limit: str) -> None:
    assert site(f"gpus_per_node: 0\ngrace_s: 100\ntime: '{limit}'").time == limit
