"""What docker/ holds for operators, against the program: flags, probes, ports, metrics, versions and the image's file system."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib

import pytest
import yaml

from harmony import SEQUENCES
from server import BINARY, ROOT, Replay, Server, run

DOCKER = ROOT / "docker"
MANIFEST = tomllib.loads((ROOT / "Cargo.toml").read_text())
VERSION = MANIFEST["workspace"]["package"]["version"]
DASHBOARD = json.loads((DOCKER / "grafana-dashboard.json").read_text())
COMPOSE = yaml.safe_load((DOCKER / "compose.yml").read_text())
OBJECTS = [
    document
    for path in sorted((DOCKER / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
PARSERS = {"openai": "harmony", "hermes": "hermes"}
METRIC = re.compile(r"\b((?:vllm|ctxserve):\w+)(?:\{([^}]*)\})?")


def instructions(stage):
    """Instructions of the Dockerfile's stages as (name, rest): 0 is the first stage, -1 the last."""
    text = re.sub(r"\\\n\s*", "", (DOCKER / "Dockerfile").read_text())
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    starts = [i for i, (name, _) in enumerate(lines) if name == "FROM"]
    stages = [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return [(name, rest) for name, rest in stages[stage]]


def said(name, stage=-1):
    return [rest for found, rest in instructions(stage) if found == name]


def unit():
    """The unit as {key: [values]}; its keys do not repeat over sections."""
    found = {}
    for line in (DOCKER / "ctxserve.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def unit_command():
    defaults = dict(part.split("=", 1) for part in shlex.split(unit()["Environment"][0]))
    command = re.sub(r"\$\{?(\w+)\}?", lambda match: defaults[match[1]], unit()["ExecStart"][0])
    return shlex.split(command)[1:]


def objects(kind):
    return [document for document in OBJECTS if document["kind"] == kind]


def pod():
    (deployment,) = objects("Deployment")
    return deployment["spec"]["template"]


def container():
    (found,) = pod()["spec"]["containers"]
    return found


COMMANDS = {
    "the unit": unit_command(),
    "the deployment": container()["args"],
    **{f"compose's {name}": service["command"] for name, service in COMPOSE["services"].items()},
}


def flag(command, name):
    """A flag's value, if it is given."""
    text = " ".join(command)
    match = re.search(rf"--{name}[= ](\S+)", text)
    return match and match[1]


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(s|m|h)?", str(text)).groups()
    return int(number) * {"s": 1, None: 1, "m": 60, "h": 3600}[unit]


@pytest.mark.parametrize("place", COMMANDS)
def test_command_lines_are_understood(place, tmp_path):
    """OPS-09: each gets as far as the download, which is refused here; a wrong flag or value is refused before."""
    command = COMMANDS[place]
    here = ["--device=cpu", "--host=127.0.0.1", "--port=0"]
    done = run(*command, *here, env={"HF_HOME": str(tmp_path)})
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr, done.stderr
    wrong = run(*command, *here, "--no-such-flag", env={"HF_HOME": str(tmp_path)})
    assert wrong.returncode == 2 and "--no-such-flag" in wrong.stderr, wrong.stderr


@pytest.mark.parametrize("place", COMMANDS)
def test_models_are_those_of_profiles(place):
    command = COMMANDS[place]
    profiles = {path.stem: tomllib.loads(path.read_text()) for path in (ROOT / "configs").glob("*.toml")}
    model = flag(command, "model") or command[1]
    profile = profiles.get(model) or next(found for found in profiles.values() if found["model"] == model)
    parser = flag(command, "tool-call-parser")
    assert parser is None or PARSERS[parser] == profile["chat-format"]


def test_what_ends_a_server_waits_for_its_drain():
    """OPS-21: nobody kills it while it still may drain."""
    for name, service in COMPOSE["services"].items():
        assert seconds(service["stop_grace_period"]) > int(flag(service["command"], "shutdown-timeout")), name
    assert seconds(unit()["TimeoutStopSec"][0]) > int(flag(unit_command(), "shutdown-timeout"))
    before = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = int(flag(container()["args"], "shutdown-timeout"))
    assert pod()["spec"]["terminationGracePeriodSeconds"] > before + drain


def test_health():
    """OPS-21: 0 while it serves, with keys too; 1 while it drains, and when it is gone."""
    with Server("--model", "demo", "--api-key", "k", "--max-model-len", "16k", "--shutdown-timeout", "600") as server:
        assert run("health", server.url).returncode == 0
        assert run("health", "--url", f"{server.url}/ping").returncode == 0
        locked = run("health", f"{server.url}/v1/models")
        assert locked.returncode == 1 and "401" in locked.stderr, locked.stderr
        endless = {"model": "demo", "prompt": "Hello", "max_tokens": 15_000, "n": 4, "extra_body": {"ignore_eos": True}}
        stream = server.client(api_key="k").completions.create(**endless, stream=True)
        next(iter(stream))
        server.signal()
        server.wait(lambda: any("shutting down" in line for line in server.log), "it drains")
        draining = run("health", server.url)
        assert draining.returncode == 1 and "503" in draining.stderr and "shutting down" in draining.stderr, draining.stderr
        server.signal()
        assert server.exit_code() == 130
    gone = run("health", server.url)
    assert gone.returncode == 1 and server.url in gone.stderr and not gone.stdout, gone.stderr
    assert run("health", "nowhere").returncode == 1
    assert run("health", "--timeout", "soon").returncode == 2


def test_health_passes_the_environment_s_proxy_by(demo):
    assert run("health", demo.url, env={"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}).returncode == 0


def test_compose():
    for name, service in COMPOSE["services"].items():
        assert service["image"] == f"ctxserve:{VERSION}"
        assert service["profiles"] == [name]
        port = flag(service["command"], "port") or "8000"
        assert service["healthcheck"]["test"] == ["CMD", "ctxserve", "health", f"http://127.0.0.1:{port}"]
        (published,) = service["ports"]
        assert published.rsplit(":", 1)[1] == port and published.startswith("${BIND:-127.0.0.1}:")
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
        assert service["volumes"] == [f"cache:{hub_home()}"] and service["read_only"] is True
    assert (DOCKER / COMPOSE["services"]["context-1"]["build"]["context"]).resolve() == ROOT
    assert "cache" in COMPOSE["volumes"]


def hub_home():
    """Where the image keeps checkpoints."""
    return dict(variable.split("=", 1) for variable in said("ENV"))["HF_HOME"]


def test_kubernetes(demo):
    """OPS-20: the probes' paths answer, and the objects name each other."""
    assert all(document["apiVersion"] and (document["kind"] == "Kustomization" or document["metadata"]["name"]) for document in OBJECTS)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container()[probe]["httpGet"]
        assert demo.get(get["path"])[0] == 200, probe
        assert get["port"] in [port["name"] for port in container()["ports"]]
    assert container()["image"] == f"ctxserve:{VERSION}"
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == "1"
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert str(ports["http"]) == said("EXPOSE")[0] == pod()["metadata"]["annotations"]["prometheus.io/port"]
    assert demo.get(pod()["metadata"]["annotations"]["prometheus.io/path"])[0] == 200
    labels = pod()["metadata"]["labels"].items()
    (service,), (deployment,), (claim,), (pool,), (route,) = map(
        objects, ["Service", "Deployment", "PersistentVolumeClaim", "InferencePool", "HTTPRoute"]
    )
    assert service["spec"]["selector"].items() <= labels
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["ports"][0]["targetPort"] in ports
    assert pool["spec"]["targetPorts"] == [{"number": ports["http"]}]
    assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == pool["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in pod()["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container()["volumeMounts"]}
    assert mounts[hub_home()]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    user = pod()["spec"]["securityContext"]
    assert f"{user['runAsUser']}:{user['runAsGroup']}" == said("USER")[0]
    (kustomization,) = objects("Kustomization")
    assert all((DOCKER / "kubernetes" / name).is_file() for name in kustomization["resources"])


def samples(*servers):
    """Labels by name of every sample of /metrics."""
    found = {}
    for server in servers:
        for line in server.get("/metrics")[2].splitlines():
            if match := re.match(r"([a-zA-Z_:]\w*(?::\w+)?)(?:\{(.*)\})? \S+$", line):
                found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
    return found


def test_the_dashboard_shows_what_there_is(demo):
    """OPS-22."""
    with Replay([SEQUENCES["misspelt channel"]]) as odd:
        odd.client().chat.completions.create(model=odd.client().models.list().data[0].id, messages=[{"role": "user", "content": "x"}])
        there = samples(demo, odd)
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable]
    used = set()
    for query in queries:
        assert query.count("(") == query.count(")") and METRIC.search(query), query
        assert set(re.findall(r"\$(\w+)", query)) <= variables | {"__rate_interval"}, query
        for name, selector in METRIC.findall(query):
            assert name in there, f"{name} is not in /metrics"
            assert set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', selector)) <= there[name], query
            used.add(name)
        for grouped in re.findall(r"by \(([^)]*)\)", query):
            names = [name for name, _ in METRIC.findall(query)]
            assert all(label.strip() in there[name] for label in grouped.split(",") for name in names), query
    for wanted in (
        "vllm:time_to_first_token_seconds_bucket", "ctxserve:inter_token_latency_seconds_bucket", "vllm:request_queue_time_seconds_bucket",
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total",
        "ctxserve:parser_recoveries_total", "ctxserve:http_responses_total", "ctxserve:engine_steps_total",
    ):  # fmt: skip
        assert wanted in used, wanted


def test_the_endpoint_picker_finds_its_metrics(demo):
    """OPS-22: the names that kubernetes/inference-pool.yaml says are read, and the labels of the cache's size."""
    named = re.findall(r"vllm:\w+", (DOCKER / "kubernetes" / "inference-pool.yaml").read_text())
    there = samples(demo)
    assert len(named) == 4 and set(named) <= set(there)
    assert {"block_size", "num_gpu_blocks"} <= there["vllm:cache_config_info"]


def test_the_dockerfile_pins_what_the_repository_pins():
    text = (DOCKER / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    assert re.fullmatch(r"\d+\.\d+\.\d+", arguments["RUST"])
    assert arguments["RUST"].rpartition(".")[0] == MANIFEST["workspace"]["package"]["rust-version"]
    assert said("FROM", 0) == ["rust:${RUST}-slim-${DEBIAN} AS build"] and said("FROM") == ["scratch"]
    # The compiler of the kernels is kernels/toolchain's, whose versions are in kernels/toolchain.txt alone.
    pins = re.findall(r"==(\S+)", (ROOT / "kernels" / "toolchain.txt").read_text())
    assert pins and not any(pin in text for pin in pins)
    build = " ".join(said("RUN", 0))
    assert "CUDA_HOME=$(kernels/toolchain)" in build and "CTXSERVE_REQUIRE_CUDA=1" in build and "--locked" in build
    assert re.search(r"--profile (\w+)", build)[1] in MANIFEST["profile"]
    for sources in said("COPY", 0):
        assert all((ROOT / source).exists() for source in sources.split()[:-1]), sources
    assert re.findall(r"ctxserve:([\d.]+)", text) == [VERSION, VERSION]


def test_the_context_of_the_build_is_the_sources_alone():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / path).exists() for path in allowed)
    needed = [*MANIFEST["workspace"]["members"], "Cargo.toml", "Cargo.lock", "kernels/toolchain", "configs", "docker/image-root"]
    included = re.compile(r'include_(?:str|bytes)!\("(\.\./[^"]+)"\)')
    for source in ROOT.glob("crates/*/src/**/*.rs"):
        needed += [(source.parent / name).resolve().relative_to(ROOT).as_posix() for name in included.findall(source.read_text())]
    assert any(path.startswith("configs/") and path.endswith(".toml") for path in needed)
    for path in needed:
        assert any(path == name or path.startswith(f"{name}/") for name in allowed), path
    assert "target" not in allowed and ".git" not in allowed


def test_the_image_serves_as_a_user_without_rights():
    (user,), (entry,), (health,) = said("USER"), said("ENTRYPOINT"), said("HEALTHCHECK")
    assert int(user.split(":")[0]) > 0
    assert json.loads(entry) == ["ctxserve"]
    command = json.loads(health.partition(" CMD ")[2])
    assert command[:2] == ["ctxserve", "health"] and "--help" in run(*command[1:], "--help").stdout
    assert said("EXPOSE") == ["8000"] and said("VOLUME") == [hub_home()]
    variables = dict(variable.split("=", 1) for variable in said("ENV"))
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all" and variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_the_image_s_file_system_serves():
    """OPS-23: docker/image-root refuses more than 300 MB, and docker/check runs what it made as the Dockerfile says."""
    done = subprocess.run([DOCKER / "check", BINARY], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    size = int(re.search(r": (\d+) MB$", done.stdout, re.MULTILINE)[1])
    assert 1 < size <= 300, done.stdout


def test_an_image_that_is_too_large_is_refused(tmp_path):
    """OPS-23."""
    if shutil.which("dpkg-query") is None:
        pytest.skip("docker/image-root takes files from Debian's packages, and there is no dpkg here")
    large = tmp_path / "large"
    shutil.copy(BINARY, large)
    with large.open("ab") as file:
        # A hole: it takes no room here.
        file.truncate(301_000_000)
    done = subprocess.run([DOCKER / "image-root", large, tmp_path / "root"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "at most 300000000" in done.stderr, done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path):
    text = (DOCKER / "ctxserve.service").read_text()
    path = tmp_path / "ctxserve.service"
    path.write_text(text.replace(unit()["ExecStart"][0].split()[0], str(BINARY.resolve())))
    done = subprocess.run(["systemd-analyze", "--man=no", "verify", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "ctxserve.service" not in done.stderr, done.stderr


def test_the_unit_is_confined():
    settings = unit()
    for key in ("DynamicUser", "NoNewPrivileges", "ProtectHome", "PrivateTmp", "ProtectKernelModules", "RestrictNamespaces"):
        assert settings[key] == ["yes"], key
    assert settings["ProtectSystem"] == ["strict"] and settings["CapabilityBoundingSet"] == [""]
    assert settings["DevicePolicy"] == ["closed"] and settings["DeviceAllow"] == ["char-nvidia* rwm"]
    assert settings["CacheDirectory"] == ["ctxserve"] and settings["Environment"][1] == "HF_HOME=%C/ctxserve"
