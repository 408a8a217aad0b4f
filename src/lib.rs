//! blkferry
