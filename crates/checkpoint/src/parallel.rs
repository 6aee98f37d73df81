//! Large tensors by several threads: one copies from the page cache, and takes the faults of fresh memory, far slower
//! than memory allows.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::{slice, thread};

/// Most threads of one tensor: more gain little and take from whatever works beside them.
const MOST: usize = 8;

/// Processors that this process may use.
static PROCESSORS: LazyLock<usize> =
    LazyLock::new(|| thread::available_parallelism().map_or(1, std::num::NonZero::get));

/// What is left of a job.
struct Work<'a, T, E> {
    pieces: std::iter::Enumerate<slice::ChunksMut<'a, T>>,
    /// The lowest piece that failed, and how.
    failed: Option<(usize, E)>,
}

/// Calls `fill(first, piece)` for every piece of `len` elements of `into` (the last may be shorter), `first` being the
/// index of the piece's first element. Several threads work where there are several pieces.
///
/// # Errors
/// That of the lowest piece that fails. Later ones may then be left as they were.
pub(crate) fn pieces<T: Send, E: Send>(
    into: &mut [T],
    len: usize,
    fill: impl Fn(usize, &mut [T]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    by_threads(*PROCESSORS, into, len, fill)
}

fn by_threads<T: Send, E: Send>(
    threads: usize,
    into: &mut [T],
    len: usize,
    fill: impl Fn(usize, &mut [T]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let len = len.max(1);
    let count = into.len().div_ceil(len);
    let work = Mutex::new(Work { pieces: into.chunks_mut(len).enumerate(), failed: None });
    let worker = || {
        loop {
            // Pieces are handed out in order, so all below a failed one are in some thread's hands: they finish, and
            // the error does not depend on which thread was faster.
            let next = {
                let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
                if work.failed.is_some() { None } else { work.pieces.next() }
            };
            let Some((at, piece)) = next else { return };
            if let Err(error) = fill(at * len, piece) {
                let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
                if work.failed.as_ref().is_none_or(|(lowest, _)| at < *lowest) {
                    work.failed = Some((at, error));
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(MOST).min(count) {
            // A thread that the system refuses is one that does not help.
            let _ = thread::Builder::new().name("read".to_owned()).spawn_scoped(scope, worker);
        }
        worker();
    });
    let failed = work.into_inner().unwrap_or_else(PoisonError::into_inner).failed;
    failed.map_or(Ok(()), |(_, error)| Err(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_filled_once_whatever_the_threads() {
        for threads in [1, 2, 5, 64] {
            for (count, len) in [(0, 4), (1, 4), (4, 4), (5, 4), (1000, 7), (10, 0)] {
                let mut values = vec![0_usize; count];
                by_threads(threads, &mut values, len, |first, piece| {
                    piece.iter_mut().enumerate().for_each(|(i, value)| *value += first + i + 1);
                    Ok::<_, ()>(())
                })
                .unwrap();
                assert!(values.into_iter().eq(1..=count), "{threads} threads, {count} by {len}");
            }
        }
    }

    #[test]
    fn the_lowest_error_wins() {
        for _ in 0..200 {
            let mut values = vec![0_u8; 64];
            let error = by_threads(8, &mut values, 1, |first, _| match first {
                9 => {
                    thread::yield_now();
                    Err(first)
                }
                10..=20 => Err(first),
                _ => Ok(()),
            });
            assert_eq!(error, Err(9));
        }
    }
}
