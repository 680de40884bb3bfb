"""Recovery points served over NBD: a guest boots from one at once, writing to a local overlay."""

from holdfast.serving.point_server import PointServer, Serving
from holdfast.serving.server import Address, SocketAddress, TcpAddress

__all__ = ["Address", "PointServer", "Serving", "SocketAddress", "TcpAddress"]
