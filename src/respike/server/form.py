"""A file out of a multipart/form-data body (RFC 7578), in memory: nothing is written to a disk."""

from dataclasses import dataclass
from email.message import Message

from respike.server.errors import ApiError

FORM = "multipart/form-data"
MAX_PARTS = 32
MAX_HEADER_BYTES = 8192
MAX_BOUNDARY_BYTES = 70
"""RFC 2046."""


@dataclass(frozen=True)
class Part:
    """A field of a form.

    Attributes:
        name: Of the field.
        filename: As the client calls the file; None for a field without one.
        kind: Media type; empty where the client names none.
        content: As it was sent.
    """

    name: str
    filename: str | None
    kind: str
    content: bytes


def is_form(content_type: str) -> bool:
    """Whether a body of this type is a form."""
    return content_type.split(";")[0].strip().lower() == FORM


def file_of(content_type: str, body: bytes) -> Part:
    """The one file of a form; other fields, such as OpenAI's ``purpose``, mean nothing here.

    Raises:
        ApiError: The form is malformed, or has no file, or several.
    """
    files = [part for part in parts_of(content_type, body) if part.filename is not None]
    if len(files) != 1:
        raise ApiError(
            400, f"the form has {len(files)} files, expected one: curl -F file=@NAME", param="file"
        )
    return files[0]


def parts_of(content_type: str, body: bytes) -> list[Part]:
    """All fields of a form.

    Raises:
        ApiError: It is malformed, or has more than `MAX_PARTS`.
    """
    given = _header("content-type", content_type).get_param("boundary", "")
    boundary = given if isinstance(given, str) else ""
    if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES or not boundary.isascii():
        raise _malformed("its boundary is missing or longer than RFC 2046 allows")
    mark = b"\r\n--" + boundary.encode()
    _, *pieces = (b"\r\n" + body).split(mark, MAX_PARTS + 1)
    if not pieces:
        raise _malformed("its boundary does not stand in it")
    if len(pieces) > MAX_PARTS:
        raise _malformed(f"it has more than {MAX_PARTS} parts")
    *whole, end = pieces
    if not end.startswith(b"--"):
        raise _malformed("its end is missing")
    return [_part(piece) for piece in whole]


def _part(piece: bytes) -> Part:
    head, found, content = piece.partition(b"\r\n\r\n")
    if not found or len(head) > MAX_HEADER_BYTES:
        raise _malformed("a part has no header, or a very long one")
    fields: dict[str, Message] = {}
    for line in head.decode("utf-8", "replace").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = _header(name.strip().lower(), value.strip())
    about = fields.get("content-disposition")
    if about is None or about.get_content_disposition() != "form-data":
        raise _malformed("a part is not called form-data")
    field = about.get_param("name", "", header="content-disposition")
    kind = fields["content-type"].get_content_type() if "content-type" in fields else ""
    return Part(str(field), about.get_filename(), kind, content)


def _header(name: str, value: str) -> Message:
    """One header, for its parameters."""
    message = Message()
    message[name] = " ".join(value.split())  # a line break would be another header
    return message


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"the form cannot be read: {why}", "malformed_form")
