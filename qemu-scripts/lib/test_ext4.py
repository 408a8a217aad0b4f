# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Tests of the file-system checks on the host: good ones pass, and each kind of damage is noticed. The images are made
by the same mke2fs and fio that the guest uses."""

import json
import os
import socket
import tempfile
import types
import unittest

import ext4
from process import Failure
from shell import Shell
from tree import Tree

TREE = Tree(os.environ["TOOLS"])
MIB = 1 << 20


class Folder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name):
        return os.path.join(self.folder, name)

    def turn(self, path, offset):
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x5a]))


class Image(Folder):
    def setUp(self):
        super().setUp()
        os.makedirs(self.path("tree/keep"))
        self.wanted = {}
        for n in range(5):
            with open(self.path(f"tree/keep/f{n}"), "wb") as out:
                out.write(os.urandom(n * 9000 + 1))
            self.wanted[f"keep/f{n}"] = ext4.digest(self.path(f"tree/keep/f{n}"))
        self.image = self.path("image")
        TREE.run("sbin/mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", self.path("tree"), self.image, "16m")

    def block_of(self, name):
        return int(TREE.run("sbin/debugfs", "-R", f"bmap {name} 1", self.image).split()[-1])

    def extracted(self):
        ext4.extract(TREE, self.image, self.path("out"))
        return self.path("out")

    def test_a_good_image_passes(self):
        ext4.fsck(TREE, self.image)
        self.assertEqual(ext4.compare(self.extracted(), self.wanted), 5)

    def test_one_wrong_byte_of_a_file(self):
        self.turn(self.image, self.block_of("/keep/f3") * 4096 + 77)
        ext4.fsck(TREE, self.image)  # the file system itself is whole
        with self.assertRaisesRegex(Failure, "1 of 5 files are wrong: keep/f3 has other content"):
            ext4.compare(self.extracted(), self.wanted)

    def test_a_missing_file(self):
        self.wanted["keep/f9"] = self.wanted["keep/f1"]
        with self.assertRaisesRegex(Failure, "keep/f9 is missing"):
            ext4.compare(self.extracted(), self.wanted)

    def test_nothing_to_compare_is_no_success(self):
        with self.assertRaises(Failure):
            ext4.compare(self.extracted(), {})

    def test_a_wrong_byte_of_a_group_descriptor_which_the_exit_status_hides(self):
        self.turn(self.image, 4096 + 18)
        with self.assertRaisesRegex(Failure, "checksums are invalid"):
            ext4.fsck(TREE, self.image)

    def test_a_wrong_byte_of_an_inode(self):
        TREE.run("sbin/debugfs", "-w", "-R", "set_inode_field /keep/f2 links_count 7", self.image)
        with self.assertRaises(Failure):
            ext4.fsck(TREE, self.image)

    def test_a_journal_that_wants_a_replay(self):
        TREE.run("sbin/debugfs", "-w", "-R", "feature needs_recovery", self.image)
        with self.assertRaises(Failure):
            ext4.fsck(TREE, self.image)


class Fio(Folder):
    def fio(self, *words, expect=(0,)):
        TREE.run("usr/bin/fio", "--name=job", f"--directory={self.folder}", "--rw=randwrite", "--bs=4k", "--size=1m",
                 "--ioengine=psync", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
                 "--output-format=json",
                 f"--output={self.path('json')}", *words, expect=expect)
        with open(self.path("json"), encoding="utf-8") as file:
            return file.read()

    def test_what_was_verified_is_counted(self):
        self.assertEqual(ext4.fio_verified(self.fio(), MIB), MIB)

    def test_a_run_that_verified_nothing_is_no_success(self):
        with self.assertRaisesRegex(Failure, "0 of 1048576 bytes verified"):
            ext4.fio_verified(self.fio("--do_verify=0"), MIB)

    def test_a_wrong_byte_is_noticed_and_the_result_says_so(self):
        self.fio("--do_verify=0")
        self.turn(self.path("job.0.0"), 500000)
        text = self.fio("--verify_only", expect=(1,))
        with self.assertRaisesRegex(Failure, "fio job job: error 84"):
            ext4.fio_verified(text, 0)

    def test_no_result_is_no_success(self):
        for text in ["", "fio: oops", json.dumps({"jobs": []})]:
            with self.assertRaises(Failure):
                ext4.fio_verified(text, MIB)


class Port(Folder):
    """The shell's host side, against a guest that is played here."""

    def setUp(self):
        super().setUp()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path("port"))
        listener.listen()
        self.addCleanup(listener.close)
        process = types.SimpleNamespace(running=lambda: True)
        open(self.path("console.log"), "wb").close()
        self.shell = Shell(types.SimpleNamespace(name="played", path=self.path, process=process))
        self.addCleanup(self.shell.port.close)
        self.guest = listener.accept()[0]
        self.addCleanup(self.guest.close)

    def say(self, text):
        self.guest.sendall(text.encode())

    def test_output_and_notes_are_told_apart_in_pieces_of_any_size(self):
        text = "\nready 1.0\nnote synced a 1\nout 1 one\nnote synced b 2\nout 1 two words\nend 1 0 2\n"
        for byte in text:
            self.shell.number = 1
            self.shell.take(byte.encode())
        self.assertEqual(self.shell.output, ["one", "two words"])
        self.assertEqual([match[1] for match in self.shell.noted(r"synced (\S+) \d")], ["a", "b"])

    def test_a_failed_command_fails(self):
        self.say("out 1 no such thing\nend 1 2 1\n")
        with self.assertRaisesRegex(Failure, "status 2\nno such thing"):
            self.shell.run("something")

    def test_a_lost_line_fails(self):
        self.say("out 1 one\nend 1 0 2\n")
        with self.assertRaisesRegex(Failure, "1 of 2 lines"):
            self.shell.run("something")

    def test_a_guest_that_boots_by_itself_fails(self):
        self.say("ready 1.0\nready 0.9\n")
        with self.assertRaisesRegex(Failure, "booted by itself"):
            self.shell.run("something")

    def test_a_guest_that_is_gone_fails(self):
        self.guest.close()
        with self.assertRaisesRegex(Failure, "has ended"):
            self.shell.run("something")


if __name__ == "__main__":
    unittest.main()
