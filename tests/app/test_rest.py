"""The REST interface: pictures as the painter paints them, a bounded queue, nothing trusted."""

import concurrent.futures
import io
import json
import struct
import tempfile
import time
import zlib

import numpy as np
import painters
import pytest
from PIL import Image

from qk_jax import painting
from qk_jax.base.errors import InputError
from tests import needs
from tests.app import serving
from tests.app.serving import FAST, LONG, upload

httpx = needs.module("httpx2")
ENDED = ("done", "failed", "cancelled")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return serving.folders(tmp_path_factory)


@pytest.fixture(scope="module")
def address(paths):
    with serving.serve(paths) as address:
        yield address


@pytest.fixture(scope="module")
def painter(paths):
    return painting.load(paths[0], ema=False, batch=1)


@pytest.fixture
def client(address):
    """A client; whatever it left behind is cancelled."""
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client
        for job in client.get("/api/jobs").json():
            client.delete(f"/api/jobs/{job['id']}")


def form(prompt="a red kite", **more):
    return {"prompt": prompt, "ema": False, "settings": FAST} | more


def ask(client, **more):
    """The job of a form that is taken."""
    answer = client.post("/api/paint", json=form(**more))
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/api/jobs/{answer.json()['id']}"
    return answer.json()


def wait(client, job, *states):
    """The job when it is in one of the states, by default over."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        now = client.get(f"/api/jobs/{job['id']}").json()
        if now["state"] in (states or ENDED):
            return now
        time.sleep(0.02)
    raise AssertionError(now)


def picture(client, path):
    return Image.open(io.BytesIO(client.get(path).raise_for_status().content))


def refused(client, status=422, **more):
    """The one line with which a form is refused."""
    answer = client.post("/api/paint", json=form(**more))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert "\n" not in error and "Traceback" not in error
    return error


def test_eight_clients_at_once_get_what_the_painter_paints(address, painter):
    def one(number):
        source = painters.picture(number) if number % 2 else None
        with httpx.Client(base_url=address, timeout=300) as client:
            given = {} if source is None else {"source": upload(source)}
            job = ask(client, prompt=f"paint {number}", seed=number, size="32x48", **given)
            done = wait(client, job)
            assert done["state"] == "done", done
            return np.asarray(picture(client, *done["pictures"])), source

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        painted = list(pool.map(one, range(8)))
    for number, (pixels, source) in enumerate(painted):
        request = painter.fit(f"paint {number}", source, (), (48, 32), number)
        (expected,) = painter.paint([request], painting.Settings(**FAST))
        np.testing.assert_array_equal(pixels, expected)


def test_a_png_says_how_it_was_painted_and_numbers_have_noise_of_their_own(client, painter):
    settings = {"steps": 3, "guidance": 2.5, "solver": "heun", "guidance_interval": [0.1, 0.9]}
    pictures = {"source": upload(painters.picture(1), "../../etc/a hat.png"),
                "references": [upload(painters.picture(2), "C:\\cup.png")]}  # fmt: skip
    job = ask(client, prompt="überm Meer", seed=5, num=2, settings=settings, **pictures)
    done = wait(client, job)
    first, second = (picture(client, path) for path in done["pictures"])
    assert (first.text["prompt"], first.text["seed"]) == ("überm Meer", "5")
    told = [json.loads(one.text["settings"]) for one in (first, second)]
    assert [one["number"] for one in told] == [0, 1]
    assert told[0].items() >= (settings | {"image_guidance": 1.5, "ema": False}).items()
    assert (told[0]["source"], told[0]["references"]) == ("a hat.png", ["cup.png"])
    assert told[0]["checkpoint"] == done["model"] and told[0]["model"] == painter.name
    assert (np.asarray(first) != np.asarray(second)).any()


def events_of(client, job):
    """(name, data) of the events of a job, to the end."""
    found, headers = [], {"Accept": "text/event-stream"}
    with client.stream("GET", f"/api/jobs/{job['id']}", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                found.append([line.removeprefix("event: ")])
            elif line.startswith("data: "):
                found[-1].append(json.loads(line.removeprefix("data: ")))
    return found


def test_events_tell_states_steps_and_previews(client):
    begun = time.monotonic()
    job = ask(client, settings={"steps": 1000}, preview=20, size="32x32")
    events = events_of(client, job)
    states = [data for name, data in events if name == "state"]
    assert len(states) < 20 * (time.monotonic() - begun) + 5
    order = ["queued", "loading", "compiling", "painting", "done"]
    seen = [order.index(one["state"]) for one in states]
    assert seen == sorted(seen) and seen[-1] == 4 and len(states[-1]["pictures"]) == 1
    steps = [one["step"] for one in states if one["state"] == "painting" and one["step"]]
    assert steps == sorted(steps) and len(set(steps)) > 3
    previews = [data for name, data in events if name == "preview"]
    assert previews and all(one["step"] % 20 == 0 for one in previews)
    head, _, data = previews[-1]["picture"].partition(",")
    assert head == "data:image/webp;base64"
    shown = Image.open(io.BytesIO(serving.base64.b64decode(data)))
    assert (shown.format, shown.size) == ("WEBP", (32, 32))
    assert events_of(client, job)[-1][1]["state"] == "done"  # who comes late hears the end


def test_the_queue_is_bounded_and_goes_on(client):
    jobs = [ask(client, **LONG)]
    wait(client, jobs[0], "painting")
    jobs += [ask(client, seed=number) for number in range(serving.WAITING)]
    assert [job["ahead"] for job in jobs[1:]] == list(range(1, serving.WAITING + 1))
    answer = client.post("/api/paint", json=form())
    assert answer.status_code == 429 and "8 jobs are waiting" in answer.json()["error"]
    assert int(answer.headers["retry-after"]) > 0
    client.delete(f"/api/jobs/{jobs[1]['id']}")
    late = ask(client)  # there is room again
    client.delete(f"/api/jobs/{jobs[0]['id']}")
    assert wait(client, late)["state"] == "done"
    states = [wait(client, job)["state"] for job in jobs]
    assert states == ["cancelled"] * 2 + ["done"] * (serving.WAITING - 1)


def test_a_job_is_cancelled_between_two_steps(client):
    job = ask(client, **LONG)
    wait(client, job, "painting")
    cancelled = client.delete(f"/api/jobs/{job['id']}").json()
    assert cancelled["state"] == "cancelled" and cancelled["pictures"] == []
    begun = time.monotonic()
    assert wait(client, ask(client))["state"] == "done"
    assert time.monotonic() - begun < 30
    assert client.get(f"/api/jobs/{job['id']}").json()["step"] < 1000
    assert client.delete("/api/jobs/unknown").status_code == 404


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG of a few bytes that says it has side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_broken_uploads_are_refused_by_name(client, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole = serving.png(painters.picture(1))
    for data, words in [
        (whole[: len(whole) // 2], "cannot be decoded"),
        (b"no picture", "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be decoded"),
        (bomb(9_000), "exceeds the bound of 64,000,000 pixels"),
        (bomb(30_000), "could be decompression bomb"),
    ]:
        error = refused(client, references=[upload(whole), upload(data, "/tmp/../x y.png")])
        assert "reference 2 'x y.png'" in error and words in error
    bad = {"name": "a.png", "data": "not base64!"}
    assert "source 'a.png' is not in base64" in refused(client, source=bad)
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_a_request_is_bounded_however_it_says_its_length(client):
    from qk_jax.app import guard

    kind = {"Content-Type": "application/json"}
    large = b'{"prompt": "' + b"a" * guard.MAX_BYTES + b'"}'
    for body in (large, (large[start : start + 2**20] for start in range(0, len(large), 2**20))):
        try:
            answer = client.post("/api/paint", content=body, headers=kind)
        except httpx.TransportError:  # the app hangs up on who keeps on sending
            continue
        assert answer.status_code == 413 and "64 MiB" in answer.json()["error"]
    assert client.get("/api/models").status_code == 200


def test_names_and_ids_are_no_paths(client):
    for path in [
        "/static/../app.py", "/static/%2e%2e%2f%2e%2e%2fsetup.py", "/static/..%5cserver.py",
        "/static//etc/passwd", "/static/%00", "/api/jobs/..%2f..%2fmodels/pictures/0.png",
        "/api/jobs/%2e%2e", "/api/jobs/x/pictures/..%2f0.png",
    ]:  # fmt: skip
        answer = client.get(path)
        assert answer.status_code in (404, 405, 422) and "error" in answer.json(), path
    job = wait(client, ask(client))
    for number in ("1", "-1", "00x", "9" * 30):
        path = f"/api/jobs/{job['id']}/pictures/{number}.png"
        assert client.get(path).status_code in (404, 422)
    assert "there is no model '../one'" in refused(client, model="../one")


def test_what_is_wrong_is_said_as_everywhere(client):
    with pytest.raises(InputError) as error:
        painting.Settings(steps=0)
    assert refused(client, settings={"steps": 0}) == str(error.value)
    many = [upload(painters.picture(1))] * 9
    for more, words in [
        ({"prompt": " "}, "there is no prompt"),
        ({"prompt": "long " * 100}, "tokens, the model reads 48"),
        ({"size": "33x32"}, "size 33x32 is no multiple of 16"),
        ({"size": "8000x8000"}, "sixteen times"),
        ({"seed": -1}, "seed is -1"),
        ({"references": many}, "9 references are given"),
        ({"num": 1000}, "num: "),
        ({"settings": {"step": 3}}, "settings.step: "),
        ({"settings": {"steps": "many"}}, "settings.steps: "),
        ({"promt": "x"}, "promt: "),
    ]:
        assert words in refused(client, **more)
    kind = {"Content-Type": "application/json"}
    for body in (b"{", b"[" * 100_000, b"\xff", b"[]"):
        answer = client.post("/api/paint", content=body, headers=kind)
        assert answer.status_code in (400, 422) and "error" in answer.json()


def test_unknown_characters_are_noted(client):
    job = ask(client, prompt="a 🪁 and a kite")
    assert job["notes"] == ["the tokenizer does not know 🪁; say it in other words"]


def test_models_are_told_and_paint_on_the_same_noise(client, paths):
    app = client.get("/api/models").json()
    one, other = app["models"]
    assert (one["ema"], other["ema"]) == (True, False)
    assert one["name"] != other["name"] and all(x["sizes"] for x in (one, other))
    assert app["settings"]["steps"] == 30
    painted = []
    for number, (name, average) in enumerate([(0, True), (0, False), (1, True)]):
        job = ask(client, model=app["models"][name]["name"], ema=average, seed=3, size="32x32")
        done = wait(client, job)
        assert done["ema"] == (number == 0)
        painted.append(np.asarray(picture(client, *done["pictures"])))
        alone = painting.load(paths[name], ema=average, batch=1)
        request = alone.fit("a red kite", size=(32, 32), seed=3)
        (expected,) = alone.paint([request], painting.Settings(**FAST))
        np.testing.assert_array_equal(painted[-1], expected)
    assert (painted[0] != painted[1]).any() and (painted[1] != painted[2]).any()


def test_lines_of_a_file_are_read_as_by_the_command(client):
    def post(text):
        body = {"name": "a/many.jsonl", "text": text, "seed": 4}
        return client.post("/api/lines", json=body)

    good = post('{"prompt": "a kite"}\n\n{"prompt": "a cup", "seed": 7, "out": "b.png"}\n')
    assert good.json() == [
        {"prompt": "a kite", "seed": 4, "out": "00001.png"},
        {"prompt": "a cup", "seed": 7, "out": "b.png"},
    ]
    for text, words in [
        ('{"prompt": "a"}\n{"promt": "b"}', "line 2 of many.jsonl: unknown key 'promt'"),
        ('{"prompt": "a", "source": "/etc/passwd"}', "line 1 of many.jsonl: it names pictures"),
        ("", "holds no prompt"),
    ]:
        assert post(text).status_code == 422 and words in post(text).json()["error"]


def test_pages_of_other_sites_change_and_read_nothing(client, address):
    own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/paint", json=form(), headers=own).status_code == 202
    for headers, status in [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:7860"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "a@127.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": address + "0"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
    ]:
        answer = client.post("/api/paint", content=json.dumps(form()), headers=headers)
        assert answer.status_code == status and answer.json()["error"], headers
    job = ask(client, **LONG)
    path = f"/api/jobs/{job['id']}"
    assert client.delete(path, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/api/models", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/api/models", headers={"Host": "localhost:1"}).status_code == 200


def test_every_answer_has_the_policy(client):
    for path in ("/", "/docs", "/static/app.js", "/api/models", "/nowhere", "/openapi.json"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def test_with_a_token_nobody_asks_without_it(paths):
    with serving.serve(paths[:1], token="a long secret") as address:
        with httpx.Client(base_url=address, follow_redirects=False) as client:
            for path in ("/", "/docs", "/static/app.js", "/api/models", "/?token=wrong"):
                answer = client.get(path)
                assert answer.status_code == 401 and "token" in answer.json()["error"]
            bad = {"Authorization": "Bearer a long secre"}
            assert client.post("/api/paint", json=form(), headers=bad).status_code == 401
            good = {"Authorization": "Bearer a long secret", "Host": "pod.example"}
            assert client.get("/api/models", headers=good).status_code == 200
            welcome = client.get("/?token=a%20long%20secret")
            assert (welcome.status_code, welcome.headers["location"]) == (303, "/")
            cookie = welcome.headers["set-cookie"].lower()
            assert "httponly" in cookie and "samesite=strict" in cookie
            assert client.get("/api/models").status_code == 200  # the client keeps the cookie
            cross = {"Origin": "http://evil.example"}
            assert client.post("/api/paint", json=form(), headers=cross).status_code == 403


def test_what_fails_ends_one_job_alone(client, monkeypatch):
    from qk_jax.app import models

    def broken(self, model, average):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    job = ask(client, **LONG)
    wait(client, job, "painting")
    victim, after = ask(client), ask(client)
    original = models.Models.painter
    monkeypatch.setattr(models.Models, "painter", broken)
    client.delete(f"/api/jobs/{job['id']}")
    failed = wait(client, victim)
    monkeypatch.setattr(models.Models, "painter", original)
    assert failed["state"] == "failed" and "not enough memory" in failed["error"]
    assert wait(client, after)["state"] in ENDED
    assert wait(client, ask(client))["state"] == "done"


def test_old_jobs_are_forgotten(client, monkeypatch):
    from qk_jax.app import jobs

    monkeypatch.setattr(jobs, "KEPT_JOBS", 2)
    ids = [wait(client, ask(client, seed=n))["id"] for n in range(4)]
    deadline = time.monotonic() + 10
    while len(known := [job["id"] for job in client.get("/api/jobs").json()]) > 2:
        assert time.monotonic() < deadline
    assert known == ids[-2:] and client.get(f"/api/jobs/{ids[0]}").status_code == 404
