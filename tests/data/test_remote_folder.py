"""Buckets and other remote folders: each object is read once, and no secret is told."""

import socket
import time

import boto3
import fsspec
import pytest
from backend_cases import captions, png, reasons, surveyed
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

import fluxfast.data.mirror as mirror
import fluxfast.data.remote_folder as remote_folder
from fluxfast.config.backends import Bucket, RemoteFolder

KEY, SECRET = "AKIAVERYSECRET", "veryhushhush"


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server, request):
    """A bucket of its own for each test, and what writes to it."""
    client = boto3.client(
        "s3",
        endpoint_url=server,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    name = f"b{abs(hash(request.node.name))}"
    client.create_bucket(Bucket=name)

    def put(key, content):
        client.put_object(Bucket=name, Key=key, Body=content)

    put.delete = lambda key: client.delete_object(Bucket=name, Key=key)
    put.origin = Bucket(
        aws_bucket_name=name,
        aws_endpoint_url=server,
        aws_region_name="us-east-1",
        aws_access_key_id=SecretStr(KEY),
        aws_secret_access_key=SecretStr(SECRET),
        aws_data_prefix="/set/",
    )
    return put


@pytest.fixture
def fetched(monkeypatch):
    """The paths of the objects that are read."""
    paths, fetch = [], remote_folder._fetch

    def counting(system, path, *rest):
        paths.append(path.rpartition("/")[2])
        fetch(system, path, *rest)

    monkeypatch.setattr(remote_folder, "_fetch", counting)
    return paths


def test_a_bucket_is_read_once_and_again_only_where_it_has_changed(tmp_path, bucket, fetched):
    bucket("set/a.png", png(seed=1))
    bucket("set/a.txt", b"a caption")
    bucket("set/sub/b.png", png(seed=2))
    bucket("set/sub/b.txt", "zweite Zeile ü".encode())
    bucket("set/readme.md", b"no data")
    bucket("set/.hidden/c.png", png(seed=3))
    bucket("settle/d.png", png(seed=4))

    def looked():
        fetched.clear()
        return surveyed(tmp_path, type="aws", origin=bucket.origin, caption_strategy="textfile")

    assert captions(looked()) == {"a.png": ("a caption",), "sub/b.png": ("zweite Zeile ü",)}
    assert sorted(fetched) == ["a.png", "a.txt", "b.png", "b.txt"]
    assert len(captions(looked())) == 2 and fetched == []
    bucket("set/a.png", png(seed=9))
    bucket.delete("set/sub/b.png")
    assert list(captions(looked())) == ["a.png"]
    assert fetched == ["a.png"]


def test_keys_come_from_the_environment_where_the_config_has_none(tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    bucket("set/a.png", png())
    keyless = bucket.origin.model_copy(
        update={"aws_access_key_id": None, "aws_secret_access_key": None}
    )
    assert list(captions(surveyed(tmp_path, type="aws", origin=keyless))) == ["a.png"]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_odd_keys_are_named(tmp_path, bucket, monkeypatch):
    for key in ("set/ok.png", "set/x.png", "set/x.png/y.png", "set/a//b.png", "set/large.png"):
        bucket(key, png(256, 256) if "large" in key else png(8, 8))
    bucket("set/" + "n" * 300 + ".png", png(8, 8))
    monkeypatch.setattr(mirror, "MOST_BYTES", 5000)
    monkeypatch.setattr(remote_folder, "MOST_BYTES", 5000)
    dataset = surveyed(tmp_path, type="aws", origin=bucket.origin, max_workers=2)
    told = reasons(dataset)
    assert "also that of a folder" in told["x.png"]
    assert "no path below the folder" in told["a//b.png"]
    assert "larger than" in told["large.png"]
    assert "too long" in told["n" * 300 + ".png"]
    assert "ok.png" not in told and "x.png/y.png" not in told


def test_a_bucket_that_is_not_there(tmp_path, bucket):
    gone = bucket.origin.model_copy(update={"aws_bucket_name": "no-such-bucket"})
    with pytest.raises(ValueError, match=r'set0": bucket "no-such-bucket" at http.*'):
        surveyed(tmp_path, type="aws", origin=gone)
    with pytest.raises(ValueError, match="holds no images"):
        surveyed(tmp_path, type="aws", origin=bucket.origin)


@pytest.mark.parametrize("listens", [False, True], ids=["dead", "silent"])
def test_an_endpoint_that_does_not_answer(tmp_path, bucket, monkeypatch, listens):
    monkeypatch.setattr(remote_folder, "_CONNECT", 0.2)
    monkeypatch.setattr(remote_folder, "_SILENCE", 0.2)
    monkeypatch.setattr(remote_folder, "_TRIES", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        dead = bucket.origin.model_copy(update={"aws_endpoint_url": url})
        start = time.monotonic()
        with pytest.raises(ValueError, match=f'set0".*{url}.*read') as caught:
            surveyed(tmp_path, type="aws", origin=dead)
    assert time.monotonic() - start < 20
    assert KEY not in str(caught.value) and SECRET not in str(caught.value)


def test_a_secret_in_an_error_is_hidden(bucket):
    error = ValueError(f"the key {KEY} is refused")
    assert remote_folder._without_secrets(error, bucket.origin) == "the key *** is refused"


def test_any_store_that_fsspec_knows(tmp_path, fetched):
    system = fsspec.filesystem("memory")
    system.pipe("/pictures/one_cat.png", png())
    for reads in (["one_cat.png"], []):
        fetched.clear()
        dataset = surveyed(tmp_path, origin=RemoteFolder(url="memory://pictures"))
        assert captions(dataset) == {"one_cat.png": ("one cat",)}
        assert fetched == reads
