"""nbdkit python rbd.py conf=FILE image=NAME snap=NAME [pool=NAME]: a snapshot of an RBD image as an
NBD export, with the extents that the cluster knows.

A snapshot never changes, so each connection may see the same export. Needs python3-rbd.
"""
import nbdkit
import rados
import rbd

API_VERSION = 2

keys = {"pool": "rbd"}


def config(key, value):
    if key not in ("conf", "image", "snap", "pool"):
        raise RuntimeError(f"rbd.py: unknown key {key}")
    keys[key] = value


def config_complete():
    for key in ("conf", "image", "snap"):
        if key not in keys:
            raise RuntimeError(f"rbd.py: {key}= is missing")


class Connection:
    def __init__(self):
        self.cluster = rados.Rados(conffile=keys["conf"], rados_id="admin")
        self.cluster.connect()
        self.pool = self.cluster.open_ioctx(keys["pool"])
        self.image = rbd.Image(self.pool, keys["image"], snapshot=keys["snap"], read_only=True)

    def close(self):
        self.image.close()
        self.pool.close()
        self.cluster.shutdown()


def open(readonly):
    return Connection()


def close(connection):
    connection.close()


def get_size(connection):
    return connection.image.size()


def can_write(connection):
    return False


def can_multi_conn(connection):
    return True


def can_extents(connection):
    return True


def pread(connection, buffer, offset, flags):
    buffer[:] = connection.image.read(offset, len(buffer))


def extents(connection, count, offset, flags):
    """Objects that exist are data; what lies between them was never written."""
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    end = min(offset + count, connection.image.size())
    found = []

    def add(start, length, exists):
        known_to = found[-1][0] + found[-1][1] if found else offset
        if start > known_to:
            found.append((known_to, start - known_to, hole))
        found.append((start, length, 0 if exists else hole))

    # Compared with an empty image, what differs is what exists.
    connection.image.diff_iterate(offset, end - offset, None, add)
    add(end, 0, False)
    return [extent for extent in found if extent[1] > 0]
