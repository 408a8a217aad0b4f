# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Tests of the harness itself. A checker that never complains proves nothing: each kind of damage that a block daemon
can do is done here to a good image, and must be named."""

import os
import subprocess
import tempfile
import unittest

from guest import Guest
from host import final_object
from process import Failure, Process, wait_for

WRITER = os.environ["WRITER"]
SECTORS = 16 * 2048          # 16 MiB; MiB 5 and 13 of a base image are holes
BASE_SECTORS = SECTORS - 7


class Check(unittest.TestCase):
    """`writer check` against images made by `writer base` and damaged here."""

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.image = os.path.join(self.folder.name, "image")
        self.record = os.path.join(self.folder.name, "record")
        self.writer("base", "--out", self.image, "--size", str(BASE_SECTORS * 512))
        os.truncate(self.image, SECTORS * 512)
        hole = "ffffffff"
        self.runs = [(0, 5 * 2048, "0"), (5 * 2048, 2048, hole), (6 * 2048, 7 * 2048, "0"), (13 * 2048, 2048, hole),
                     (14 * 2048, 2 * 2048 - 7, "0"), (BASE_SECTORS, 7, hole)]
        self.write_record(self.runs)

    def write_record(self, runs, end=None):
        lines = [f"record sectors={SECTORS} base-sectors={BASE_SECTORS} seed=9"]
        lines += [f"r {first:x} {count:x} {stamp}" for first, count, stamp in runs]
        with open(self.record, "w", encoding="ascii") as out:
            out.write("\n".join(lines + [f"end runs={len(runs) if end is None else end}"]) + "\n")

    def writer(self, *words):
        done = subprocess.run([WRITER, *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def check(self):
        return self.writer("check", "--image", self.image, "--record", self.record)

    def damage(self, sector, data, offset=0):
        with open(self.image, "r+b") as out:
            out.seek(sector * 512 + offset)
            out.write(data)

    def sector(self, number):
        with open(self.image, "rb") as image:
            image.seek(number * 512)
            return image.read(512)

    def expect(self, complaint):
        status, text = self.check()
        self.assertEqual(status, 1, text)
        self.assertIn(complaint, text)
        self.assertIn(f"checked {SECTORS} sectors, 1 wrong", text)

    def test_good_image_passes(self):
        self.assertEqual(self.check()[0], 0, self.check()[1])

    def test_lost_sector(self):
        self.damage(77, bytes(512))
        self.expect("WRONG sector=77 expected=base found=zeros")

    def test_one_flipped_byte(self):
        self.damage(77, b"\x00\x01", 400)
        self.expect("WRONG sector=77 expected=base found=torn")

    def test_misplaced_sector(self):
        self.damage(77, self.sector(78))
        self.expect("WRONG sector=77 expected=base found=misplaced sector=78")

    def test_base_reappears_under_a_discard(self):
        self.write_record([(0, 77, "0"), (77, 1, "ffffffff"), (78, 5 * 2048 - 78, "0"), *self.runs[1:]])
        self.expect("WRONG sector=77 expected=zeros found=base-reappeared")

    def test_lost_write_shows_the_base(self):
        self.write_record([(0, 77, "0"), (77, 1, "1f"), (78, 5 * 2048 - 78, "0"), *self.runs[1:]])
        self.expect("WRONG sector=77 expected=31 found=base-reappeared")

    def test_garbage_in_the_last_sector(self):
        self.damage(SECTORS - 1, b"\xa5" * 512)
        self.expect(f"WRONG sector={SECTORS - 1} expected=zeros found=garbage")

    def test_incomplete_records_are_refused(self):
        for runs, end in [(self.runs[:-1], None), (self.runs[1:], None), (self.runs, 5)]:
            self.write_record(runs, end)
            status, text = self.check()
            self.assertEqual(status, 1, text)
            self.assertNotIn("checked", text)

    def test_short_image_is_refused(self):
        os.truncate(self.image, (SECTORS - 1) * 512)
        self.assertIn("sectors, the guest's disk had", self.check()[1])


class Harness(unittest.TestCase):
    def test_pause_is_the_longest_gap_that_touches_the_window(self):
        guest = Guest()
        guest.beats = [(0.0, 1), (5.0, 2), (5.1, 3), (5.4, 4), (5.5, 5), (9.5, 6)]
        self.assertEqual(guest.longest_gap_ms(5.05, 5.45), 300)
        self.assertEqual(guest.longest_gap_ms(5.05, 6), 4000)

    def test_line_cut_by_the_migration_is_whole_again(self):
        guest = Guest()
        guest.take(b"ready sec")
        guest.take(b"tors=1\nWRONG sector=3\n")
        self.assertEqual(guest.find("ready"), "ready sectors=1")
        with self.assertRaises(Failure):
            guest.expect_clean()

    def test_final_object(self):
        text = '{"state":"active"}\nnoise\n{"state":"completed","total_ms":5}\n'
        self.assertEqual(final_object(text)["total_ms"], 5)
        with self.assertRaises(Failure):
            final_object('{"state":"active"}\n')

    def test_waiting_ends_when_the_process_has_died(self):
        with tempfile.NamedTemporaryFile() as log:
            process = Process("false", ["false"], log.name)
            with self.assertRaisesRegex(Failure, "false ended with status 1"):
                wait_for("nothing", lambda: False, 30, alive=[process])


if __name__ == "__main__":
    unittest.main()
