"""Remembers verdicts in a file, so that a question is paid for once: by hash, without the picture or the prompt."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.errors import ConfigError, JudgeError
from safecode_mllm.judges.bias import verdict_bias
from safecode_mllm.judges.protocol import Judge, JudgeRequest, Verdict, is_remote

logger = logging.getLogger(__name__)

# Part of every key: a change of what a key holds must not find old rows.
_FORMAT = b"safecode verdict 1"
# Writing a row takes milliseconds; whoever waits longer than this waits for a process that hangs.
BUSY_TIMEOUT_S = 30.0
# Only the owner may read: even without the texts, a verdict tells something about what was asked.
_OWNER_ONLY = 0o600
# What a model wrote about a scene; kept on request only.
_TEXTS = ("raw", "reason", "caption")
_KEPT = ("label", "p_unsafe", "threshold", "judge", "category", "version")


class CachedJudge:
    """Asks a judge once per question and remembers the answer in an SQLite file; several processes may share it.

    Unknown and failed verdicts are never remembered. What cannot be written is asked for again, with one warning.

    Args:
        judge: who is asked; needs a `version`, else verdicts of different weights could not be told apart.
        path: the file; created with mode 0600, its folder too if need be.
        keep_texts: remember what the judge wrote (raw reply, reason, caption) besides label, probability and category.

    Raises:
        ConfigError: the judge has no version, or the file cannot be used.
    """

    def __init__(self, judge: Judge, path: str | os.PathLike[str], *, keep_texts: bool = False) -> None:
        self.judge = judge
        self.keep_texts = keep_texts
        self.path = Path(path).expanduser()
        self.members = (judge,)
        self.hits = self.misses = 0
        with _config_errors(self.path):
            _create(self.path)

    @property
    def name(self) -> str:
        """The name of the judge that is asked."""
        return self.judge.name

    @property
    def version(self) -> str | None:
        """The version of the judge that is asked."""
        return getattr(self.judge, "version", None)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the judge that is asked."""
        return dict(getattr(self.judge, "settings", {}))

    @property
    def remote(self) -> bool:
        """Whether the judge that is asked works elsewhere."""
        return is_remote(self.judge)

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict per request, in order, asking only what is not remembered and nothing twice.

        Raises:
            JudgeError: the judge failed as a whole; what it had been asked before is remembered.
        """
        if not requests:
            return []
        started = time.perf_counter()
        keys = [self._key(request) for request in requests]
        known = self._read(keys)
        latency = (time.perf_counter() - started) / len(requests)
        asked = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        fresh = dict(zip(asked, self._ask(list(asked.values())), strict=True)) if asked else {}
        self._write({key: verdict for key, verdict in fresh.items() if _worth_keeping(verdict)})
        self.hits += len(requests) - len(asked)
        self.misses += len(asked)
        return [fresh[key] if key in fresh else replace(known[key], latency_s=latency) for key in keys]

    def _ask(self, requests: list[JudgeRequest]) -> list[Verdict]:
        verdicts = list(self.judge.judge_many(requests))
        if len(verdicts) != len(requests):
            raise JudgeError(f"judge {self.name!r} gave {len(verdicts)} verdicts for {len(requests)} requests")
        return verdicts

    def _key(self, request: JudgeRequest) -> bytes:
        """Return the SHA-256 of everything that a verdict depends on, each part behind its length."""
        if not self.version:
            raise ConfigError(
                f"judge {self.name!r} has no `version`: give it one that changes with its weights or its wording, "
                "else verdicts of different judges could not be told apart in the cache"
            )
        image = request.image
        settings = json.dumps(self.settings, sort_keys=True, ensure_ascii=True)
        texts = [self.name, self.version, settings, request.policy_text or "", str(request.policy_text is None)]
        texts += [part for turn in request.conversation for part in (turn.role, turn.text)]
        texts += [request.prompt, f"{image.mode} {image.width} {image.height}"]
        if request.dialogue is not None:
            texts += [repr(request.dialogue.layout), *request.dialogue.texts]
        digest = hashlib.sha256()
        for part in (_FORMAT, *(text.encode("utf-8", "surrogatepass") for text in texts), image.tobytes()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        return digest.digest()

    def _read(self, keys: Iterable[bytes]) -> dict[bytes, Verdict]:
        found: dict[bytes, Verdict] = {}
        try:
            with closing(_connect(self.path)) as connection:
                for key in dict.fromkeys(keys):
                    row = connection.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
                    verdict = None if row is None else _from_row(row[0])
                    if verdict is not None:
                        found[key] = verdict
        except (sqlite3.Error, OSError) as error:
            logger.warning("the cache %s cannot be read, so everything is asked for again: %s", self.path, error)
        return found

    def _write(self, verdicts: dict[bytes, Verdict]) -> None:
        rows = [(key, self._to_row(verdict)) for key, verdict in verdicts.items()]
        if not rows:
            return
        try:
            with closing(_connect(self.path)) as connection, _transaction(connection):
                connection.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            logger.warning("the cache %s cannot be written, so nothing is remembered: %s", self.path, error)

    def _to_row(self, verdict: Verdict) -> str:
        fields = asdict(verdict)
        names = (*_KEPT, *_TEXTS) if self.keep_texts else _KEPT
        return json.dumps({name: fields[name] for name in names if fields[name] is not None}, sort_keys=True)

    def __repr__(self) -> str:
        return f"CachedJudge({self.judge!r}, {str(self.path)!r})"


def _worth_keeping(verdict: Verdict) -> bool:
    """Whether this is a verdict at all: no error, no unknown one, and no contradiction in itself."""
    if verdict.outcome not in ("safe", "unsafe") or verdict.policy is not None:
        return False
    try:
        verdict_bias(verdict, SafeCoDeConfig())
    except JudgeError:
        return False
    return True


def _from_row(text: str) -> Verdict | None:
    """Return the verdict of a row, None for one that holds none: it is then asked for again."""
    try:
        fields = json.loads(text)
        verdict = Verdict(**{name: fields[name] for name in (*_KEPT, *_TEXTS) if name in fields}, cached=True)
        return verdict if _worth_keeping(verdict) else None
    except (ValueError, TypeError):
        return None


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Created before SQLite sees it: SQLite would use the process's mask, and its side files take the file's own mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), _OWNER_ONLY))
    os.chmod(path, _OWNER_ONLY)
    with closing(_connect(path)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdict TEXT) WITHOUT ROWID")


def _connect(path: Path) -> sqlite3.Connection:
    """Open the file for one call: a connection must not be shared between threads or survive a fork."""
    # Never creates the file: what SQLite creates itself has the mode of the process's mask.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        # Readers and one writer at a time do not block each other, and a killed writer leaves no half row.
        _patiently(connection, "PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Execute a statement that SQLite does not wait for by itself, as it does for reads and writes."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


@contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(f"cache {str(path)!r} cannot be used: {error}; give the path of a file of its own") from error
