//! The machine's own limits.

use std::hint::black_box;
use std::time::Instant;

/// Bytes per second that `threads` threads read together from a buffer far beyond any cache; best of seven passes.
pub(crate) fn read_bandwidth(threads: usize) -> f64 {
    const BYTES: usize = 1 << 30;
    let buffer: Vec<u64> = (0..BYTES as u64 / 8).collect();
    let part = buffer.len().div_ceil(threads.max(1));
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for part in buffer.chunks(part) {
                scope.spawn(move || black_box(sum(part)));
            }
        });
        best = best.min(started.elapsed().as_secs_f64());
    }
    BYTES as f64 / best
}

/// Eight cache lines at a time, so that loads and not additions are the limit.
fn sum(values: &[u64]) -> u64 {
    let mut lanes = [0_u64; 64];
    for chunk in values.chunks_exact(64) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().fold(0, |sum, lane| sum.wrapping_add(*lane))
}

/// Resident memory of this process; 0 where the system does not say.
pub(crate) fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
