"""The frames between a coordinator and the process of its ServerApp: MessagePack. Pure.

The process asks, the coordinator answers. Arrays never go through the pipe: they are files of
weights in the folder of the run, `out/DIGEST.safetensors` from the app and `in/NUMBER.safetensors`
to it. The process runs the code of an app, so each frame that it sends has types and bounds.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from protocols.errors import BadMessage
from protocols.messages.app_work import MessageType, RecordBytes
from protocols.messages.decoding import decode
from protocols.messages.envelope import MAX_PEERS, Count, MaybeDigest, Settings, Text

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 64 * 1024 * 1024
#: In the folder of a run: the folders of files from the app, and to it.
OUT, IN, SUFFIX = "out", "in", ".safetensors"
#: Replies in one frame, which is at most half as long as one may be.
MAX_REPLIES = 48


class Hello(Struct, frozen=True, tag=True, kw_only=True):
    """The first frame to the process. `config`: changes of the app's run config."""

    flower_run: Count
    config: Settings = {}


class NodesAsked(Struct, frozen=True, tag=True):
    """Requests the nodes that can work."""


class Content(Struct, frozen=True, kw_only=True):
    """The records of a message, and the digest of the file of its arrays; empty without any."""

    told: RecordBytes
    digest: MaybeDigest = ""


class Outgoing(Struct, frozen=True, kw_only=True):
    """A message for a node, with the content of this number."""

    content: Count
    node: Count
    message_type: MessageType
    group: Text = ""


class Push(Struct, frozen=True, tag=True, kw_only=True):
    """Send these messages."""

    contents: Annotated[tuple[Content, ...], Meta(max_length=MAX_PEERS)]
    messages: Annotated[tuple[Outgoing, ...], Meta(max_length=MAX_PEERS)]


class Pull(Struct, frozen=True, tag=True, kw_only=True):
    """Requests the replies to these messages. Waits for the first one for at most `wait_s`.

    `forgotten`: messages whose replies are never asked for again.
    """

    ids: Annotated[tuple[Count, ...], Meta(max_length=MAX_PEERS)]
    wait_s: Annotated[float, Meta(ge=0, le=60)] = 0.0
    forgotten: Annotated[tuple[Count, ...], Meta(max_length=MAX_PEERS)] = ()


class End(Struct, frozen=True, tag=True, kw_only=True):
    """The ServerApp has ended; `error` says why it failed, and is empty if it did not."""

    error: Text = ""


class Nodes(Struct, frozen=True, tag=True):
    """The nodes that can work now."""

    nodes: Annotated[tuple[Count, ...], Meta(max_length=MAX_PEERS)]


class Pushed(Struct, frozen=True, tag=True):
    """The numbers of the messages, in their order; 0 for one whose node is not there."""

    ids: Annotated[tuple[Count, ...], Meta(max_length=MAX_PEERS)]


class Reply(Struct, frozen=True, kw_only=True):
    """The reply to the message `id`: its records, and whether `in/ID` has its arrays; or an
    `error`."""

    id: Count
    told: RecordBytes = b""
    has_arrays: bool = False
    error: Text = ""


class Replies(Struct, frozen=True, tag=True):
    """The replies that have come."""

    replies: Annotated[tuple[Reply, ...], Meta(max_length=MAX_REPLIES)]


AppFrame = NodesAsked | Push | Pull | End
CoordinatorFrame = Hello | Nodes | Pushed | Replies

_encode = msgspec.msgpack.Encoder().encode
_asked, _answered = msgspec.msgpack.Decoder(AppFrame), msgspec.msgpack.Decoder(CoordinatorFrame)


def encode(frame: AppFrame | CoordinatorFrame) -> bytes:
    """A frame with its length. Raises BadMessage for one that is too long."""
    body = _encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise BadMessage(f"{len(body):,} bytes are more than a frame may have")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def length_of(head: bytes) -> int:
    """The length of the frame that follows. Raises BadMessage."""
    length = int.from_bytes(head, "little")
    if length > MAX_FRAME_BYTES:
        raise BadMessage(f"a frame of {length:,} bytes, at most {MAX_FRAME_BYTES:,} are taken")
    return length


def decode_app_frame(body: bytes) -> AppFrame:
    """A frame of the process. Raises BadMessage."""
    asked: AppFrame = decode(_asked, body, "frame of a ServerApp")
    if isinstance(asked, Push) and any(m.content >= len(asked.contents) for m in asked.messages):
        raise BadMessage("a message of a ServerApp has no content")
    return asked


def decode_coordinator_frame(body: bytes) -> CoordinatorFrame:
    """A frame of the coordinator. Raises BadMessage."""
    answered: CoordinatorFrame = decode(_answered, body, "frame of the coordinator")
    return answered
