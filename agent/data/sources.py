"""What the path of the owner's data names: files, a sheet, or a table of a database. Pure.

visits.xlsx?sheet=2026
clinic.duckdb?table=visits
sqlite:////data/clinic.db?table=visits
postgresql://reader@db.clinic/ehr?query=SELECT age, outcome FROM visits
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from protocols.errors import DataError, UsageError

Kind = Literal["files", "excel", "duckdb", "sql"]

#: Databases that SQLAlchemy reads. A driver may follow: mysql+pymysql://.
DATABASES = ("postgresql", "mysql", "mariadb", "mssql", "oracle", "sqlite")
_SUFFIXES: dict[str, Kind] = {".xlsx": "excel", ".xlsm": "excel", ".duckdb": "duckdb"}
#: The rest of the address after the first of these names is its value, as it is.
_SELECTION = re.compile(r"(?s)^(.*?)[?&](table|query|sheet)=(.*)$")
#: The password of a database. Settings never hold one.
PASSWORD = "COMMONWEIGHT_DATA_PASSWORD"
#: The service name of the passwords in the keyring.
KEYRING = "commonweight"


class Source(NamedTuple):
    """`address`: a path, or the URL of a database. At most one of the others is set."""

    kind: Kind
    address: str
    table: str = ""
    query: str = ""
    sheet: str = ""

    @property
    def is_remote(self) -> bool:
        """True for a database that is reached by the network, or by a socket."""
        return self.kind == "sql" and not self.address.startswith("sqlite:")

    @property
    def file(self) -> str:
        """The file on this machine that holds the table; empty for a server."""
        if self.kind != "sql":
            return self.address
        # Four slashes stand before a full path.
        return "" if self.is_remote else self.address.partition("://")[2].removeprefix("/")


def parse(path: str) -> Source:
    """The source that a path names."""
    found = _SELECTION.match(path)
    address, name, value = found.groups() if found else (path, "", "")
    scheme, is_url, _ = address.partition("://")
    if is_url:
        is_database = scheme.partition("+")[0] in DATABASES
        kind: Kind | None = "sql" if is_database else None
    else:
        kind = _SUFFIXES.get(Path(address).suffix.lower())
    if kind is None:
        return Source("files", path)
    return Source(kind, address, **{name: value} if name else {})


def with_full_path(path: str) -> str:
    """The path with an absolute file, as trainers run in another folder. Raises UsageError.

    URLs stay as they are; one with a password is refused.
    """
    source = parse(path)
    if "://" in source.address:
        _check_no_password(source.address)
        if source.is_remote or source.kind == "files":
            return path
    rest = path[len(source.address) :]
    file = Path(source.file).expanduser().absolute()
    return f"sqlite:///{file}{rest}" if source.kind == "sql" else f"{file}{rest}"


def _check_no_password(address: str) -> None:
    try:
        password = urlsplit(address).password
    except ValueError as err:
        raise UsageError(f"the address of the data cannot be read: {err}") from None
    if password is not None or re.search(r"(?i)[?&](password|passwd|pwd)=", address):
        raise UsageError(
            "the address of the data has a password, which would lie in the settings in clear",
            f"leave it out, and set {PASSWORD}, or store it: keyring set {KEYRING} ADDRESS",
        )


def check(source: Source) -> None:
    """Raise DataError if the source says too little, or what does not fit its kind."""
    allowed = {"excel": ("sheet",), "duckdb": ("table", "query"), "sql": ("table", "query")}
    for name in ("table", "query", "sheet"):
        if getattr(source, name) and name not in allowed.get(source.kind, ()):
            raise DataError(f"the data have no {name}", f"{source.address}: leave ?{name}= out")
    if source.kind in ("duckdb", "sql") and not (source.table or source.query):
        raise DataError(
            "the address of the data names no table",
            f"{source.address}?table=NAME, or ?query=SELECT …",
        )
