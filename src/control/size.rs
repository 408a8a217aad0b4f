// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sizes and durations as people write and read them.
//!
//! A suffix is a power of 1024, as in QEMU and in coreutils' `truncate`: `64G` is 64 GiB. Fractions are refused: a disk's
//! size is exact, and `1.5G` tempts to a size that is no multiple of a sector.

use std::time::Duration;
use thiserror::Error;

/// Why a text is no size.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum SizeError {
    /// Not digits and a suffix.
    #[error("not a size: a whole number of bytes, with K, M, G, T or P for powers of 1024 (64G, 256K)")]
    Form,
    /// More than 64 bits.
    #[error("too large")]
    TooLarge,
}

/// Bytes from text such as `4096`, `256K`, `64G`, `64GiB`.
///
/// # Errors
/// [`SizeError`]
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let end = text.bytes().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    if digits.is_empty() {
        return Err(SizeError::Form);
    }
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        _ => return Err(SizeError::Form),
    };
    let number: u64 = digits.parse().map_err(|_| SizeError::TooLarge)?;
    number.checked_mul(1 << shift).ok_or(SizeError::TooLarge)
}

/// Bytes for people: `0 B`, `512 B`, `1.5 MiB`, `64.0 GiB`.
#[must_use]
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // Tenths of the unit below, kept whole: a float would round 1023.96 KiB to the odd "1024.0 KiB" as well, so the
    // unit is chosen first and the last digit is cut, not rounded.
    let mut unit = 0;
    let mut shift = 10;
    while unit + 1 < UNITS.len() && bytes >> shift >= 1024 {
        unit += 1;
        shift += 10;
    }
    let whole = bytes >> shift;
    let tenths = ((u128::from(bytes) * 10) >> shift) % 10;
    format!("{whole}.{tenths} {}", UNITS[unit])
}

/// Time for people: `0.042 s`, `12.3 s`, `3 min 05 s`, `2 h 07 min`.
#[must_use]
pub fn human_time(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.3} s", time.as_secs_f64()),
        10..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("256K", 256 << 10),
            ("256k", 256 << 10),
            ("1MiB", 1 << 20),
            ("64G", 64 << 30),
            ("2t", 2 << 40),
            ("3P", 3 << 50),
            ("7B", 7),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "G", "-1", "+1", "1.5G", "1 G", "1KB", "0x10", "1GG", "1é"] {
            assert_eq!(parse(text), Err(SizeError::Form), "{text}");
        }
        for text in ["18446744073709551616", "16384P", "99999999999999999999999"] {
            assert_eq!(parse(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn human_sizes_never_show_1024() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (3 << 19, "1.5 MiB"),
            (64 << 30, "64.0 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn human_times_keep_what_matters() {
        for (millis, text) in
            [(42, "0.042 s"), (12_340, "12.3 s"), (185_000, "3 min 05 s"), (7_620_000, "2 h 07 min")]
        {
            assert_eq!(human_time(Duration::from_millis(millis)), text);
        }
    }
}
