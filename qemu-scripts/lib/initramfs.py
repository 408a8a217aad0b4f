# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Makes the guest's initramfs.

The archive (cpio "newc") is written here rather than by cpio(1): this needs neither the tool nor root for the one
device node that a first process wants, /dev/console.
"""

import argparse
import lzma
import os
import pathlib

from tree import Tree

MODULES = ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk",
           "virtio_console"]
S_DIR, S_FILE, S_CHAR = 0o040755, 0o100755, 0o020600


class Cpio:
    """A newc archive in memory."""

    def __init__(self):
        self.data = bytearray()
        self.inode = 0

    def add(self, name, mode, content=b"", device=(0, 0)):
        """Adds one entry; `device` is (major, minor) of a node."""
        self.inode += 1
        path = name.encode() + b"\0"
        fields = [self.inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0]
        self.data += b"070701" + b"".join(b"%08X" % f for f in fields) + path
        self.pad()
        self.data += content
        self.pad()

    def pad(self):
        self.data += bytes(-len(self.data) % 4)

    def close(self):
        self.add("TRAILER!!!", 0)
        return bytes(self.data)


def find_module(root, name):
    """The bytes of a kernel module, whatever folder it is in and whether it is compressed."""
    for path in sorted(pathlib.Path(root).rglob(name + ".ko*")):
        raw = path.read_bytes()
        return lzma.decompress(raw) if path.suffix == ".xz" else raw
    raise SystemExit(f"no module {name} under {root}")


def add_programs(cpio, tree, programs):
    """Programs of a tree, with the loader and the libraries that they need, in the folders where it looks by itself."""
    files = {tree.LOADER: tree.path(tree.LOADER)}
    for program in programs:
        files["tools/" + os.path.basename(program)] = tree.path(program)
        files.update((f"lib/{name}", path) for name, path in tree.libraries(program).items())
    for folder in ["tools", "lib", os.path.dirname(tree.LOADER)]:
        cpio.add(folder, S_DIR)
    for name, path in sorted(files.items()):
        cpio.add(name, S_FILE, pathlib.Path(path).read_bytes())


def initramfs(args):
    cpio = Cpio()
    for folder in ["bin", "dev", "mnt", "proc", "sys", "tmp", "modules"]:
        cpio.add(folder, S_DIR)
    cpio.add("dev/console", S_CHAR, device=(5, 1))
    cpio.add("init", S_FILE, pathlib.Path(args.init).read_bytes())
    cpio.add("bin/busybox", S_FILE, pathlib.Path(args.busybox).read_bytes())
    for file in args.file:
        cpio.add("bin/" + os.path.basename(file), S_FILE, pathlib.Path(file).read_bytes())
    for name in MODULES:
        cpio.add(f"modules/{name}.ko", S_FILE, find_module(args.modules, name))
    if args.tools:
        add_programs(cpio, Tree(args.tools), args.program)
    return cpio.close()


def write(path, data):
    with open(path + ".part", "wb") as out:
        out.write(data)
    os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ["out", "init", "busybox", "modules"]:
        parser.add_argument("--" + name, required=True)
    parser.add_argument("--file", action="append", default=[], help="one more file for /bin")
    parser.add_argument("--tools", help="a tree of Debian packages")
    parser.add_argument("--program", action="append", default=[], help="a program of that tree, for /tools")
    args = parser.parse_args()
    write(args.out, initramfs(args))


if __name__ == "__main__":
    main()
