//! From a checkpoint to a backend: shared by the families.
//!
//! A family describes its weights in parts (the embedding, each block, the head). [`ahead`] reads the next part on a thread
//! of its own while the backend takes the current one, so that disk or page cache and device are busy at once. Two parts
//! are then in host memory: the one being taken and the one being read.

use std::sync::mpsc;
use std::thread;

use ctxserve_backend::{Backend, DeviceError, Role};
use ctxserve_checkpoint::{Checkpoint, to_bf16};
use ctxserve_core::{Elements, Encoding, Matrix};

use crate::{LoadError, LoadProgress};

/// Reads tensors of one checkpoint in encodings that a backend takes. Threads may share it.
pub(crate) struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    accepted: Vec<Encoding>,
}

/// A matrix and its bias in host memory.
pub(crate) struct Linear {
    matrix: Matrix,
    bias: Option<Vec<f32>>,
}

/// Reports each part that a backend has taken.
pub(crate) struct Progress<'a> {
    report: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
}

impl<'a> Reader<'a> {
    pub(crate) fn new<B: Backend>(checkpoint: &'a Checkpoint, backend: &B) -> Self {
        let known = [Encoding::F32, Encoding::Bf16, Encoding::Mxfp4, Encoding::Nvfp4, Encoding::Affine];
        let accepted = known.into_iter().filter(|&encoding| backend.accepts(encoding)).collect();
        Self { checkpoint, accepted }
    }

    /// A vector `[len]`.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        Ok(self.checkpoint.vector(name, len)?)
    }

    /// A stack of experts, `[experts * rows, cols]`.
    pub(crate) fn experts(
        &self,
        name: &str,
        experts: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<Matrix, LoadError> {
        Ok(self.accepted(self.checkpoint.experts(name, experts, rows, cols)?))
    }

    /// A matrix `[rows, cols]` from `NAME.weight`, with its bias from `NAME.bias` when `biased`.
    pub(crate) fn linear(
        &self,
        name: &str,
        [rows, cols]: [usize; 2],
        biased: bool,
    ) -> Result<Linear, LoadError> {
        self.fused(&[(name.to_owned(), rows)], cols, biased)
    }

    /// Matrices of equal width as one, rows in the order given.
    pub(crate) fn fused(
        &self,
        parts: &[(String, usize)],
        cols: usize,
        biased: bool,
    ) -> Result<Linear, LoadError> {
        let mut matrices = Vec::with_capacity(parts.len());
        let mut bias = biased.then(Vec::new);
        for (name, rows) in parts {
            let weight = format!("{name}.weight");
            matrices.push(self.checkpoint.matrix(&weight, *rows, cols)?);
            if let Some(bias) = &mut bias {
                bias.extend(self.checkpoint.vector(&format!("{name}.bias"), *rows)?);
            }
        }
        Ok(Linear { matrix: self.accepted(stack(matrices)?), bias })
    }

    /// The matrix as the backend takes it.
    fn accepted(&self, matrix: Matrix) -> Matrix {
        if self.accepted.contains(&matrix.encoding()) { matrix } else { to_bf16(matrix) }
    }
}

impl Linear {
    /// Gives it to a backend.
    pub(crate) fn load<B: Backend>(self, backend: &mut B, role: Role<'_>) -> Result<B::Matrix, DeviceError> {
        backend.load_matrix(self.matrix, self.bias, role)
    }
}

impl<'a> Progress<'a> {
    /// `parts` is how many times [`Progress::finished`] will be called.
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        parts: usize,
        report: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        Self { report, state: LoadProgress { done: 0, total: parts, total_bytes: checkpoint.total_bytes() } }
    }

    /// Reports one more part.
    pub(crate) fn finished(&mut self) {
        self.state.done += 1;
        (self.report)(self.state);
    }
}

/// Reads parts `0..parts` in order, each on another thread while `take` has the one before. A part is handed over when the
/// one before was taken, so at most two exist.
///
/// # Errors
/// The first of either side. A part that is being read then is read to its end and dropped.
pub(crate) fn ahead<T: Send, E: Send>(
    parts: usize,
    read: impl Fn(usize) -> Result<T, E> + Sync,
    mut take: impl FnMut(T) -> Result<(), E>,
) -> Result<(), E> {
    let reader = |sender: &mpsc::SyncSender<Result<T, E>>| {
        for part in 0..parts {
            let part = read(part);
            let ended = part.is_err();
            if sender.send(part).is_err() || ended {
                break;
            }
        }
    };
    thread::scope(|scope| {
        // Without room of its own: a part waits in the reader's hands until it is asked for.
        let (sender, receiver) = mpsc::sync_channel(0);
        let spawned =
            thread::Builder::new().name("load".to_owned()).spawn_scoped(scope, move || reader(&sender));
        if spawned.is_err() {
            // The system has no thread to give: one after the other, then.
            return (0..parts).try_for_each(|part| take(read(part)?));
        }
        receiver.into_iter().try_for_each(|part| take(part?))
    })
}

/// Puts matrices of equal width below one another. Where their encodings differ, as in checkpoints that leave single
/// projections in floats, all become bfloat16.
fn stack(parts: Vec<Matrix>) -> Result<Matrix, LoadError> {
    let mixed = parts.first().is_some_and(|first| parts.iter().any(|part| !alike(first, part)));
    let mut parts = parts.into_iter().map(|part| if mixed { to_bf16(part) } else { part });
    let Some(top) = parts.next() else {
        return Err(DeviceError::new("load_matrix", "no rows to fuse").into());
    };
    let (mut rows, cols) = (top.rows(), top.cols());
    let mut elements = top.into_elements();
    for part in parts {
        rows += part.rows();
        match (&mut elements, part.into_elements()) {
            (Elements::F32(all), Elements::F32(more)) => all.extend(more),
            (Elements::Bf16(all), Elements::Bf16(more)) => all.extend(more),
            (
                Elements::Mxfp4 { codes, scales },
                Elements::Mxfp4 { codes: more_codes, scales: more_scales },
            ) => {
                codes.extend(more_codes);
                scales.extend(more_scales);
            }
            (
                Elements::Nvfp4 { codes, scales, runs },
                Elements::Nvfp4 { codes: more_codes, scales: more_scales, runs: more_runs },
            ) => {
                codes.extend(more_codes);
                scales.extend(more_scales);
                runs.extend(more_runs);
            }
            (
                Elements::Affine { codes, scales, offsets, .. },
                Elements::Affine { codes: more_codes, scales: more_scales, offsets: more_offsets, .. },
            ) => {
                codes.extend(more_codes);
                scales.extend(more_scales);
                offsets.extend(more_offsets);
            }
            _ => return Err(DeviceError::new("load_matrix", "fused rows are stored differently").into()),
        }
    }
    Matrix::new(rows, cols, elements)
        .ok_or_else(|| DeviceError::new("load_matrix", "fused widths differ").into())
}

/// Whether rows of both can lie in one matrix as they are stored.
fn alike(a: &Matrix, b: &Matrix) -> bool {
    match (a.elements(), b.elements()) {
        (
            Elements::Affine { bits, group, .. },
            Elements::Affine { bits: other_bits, group: other_group, .. },
        ) => (bits, group) == (other_bits, other_group),
        _ => a.encoding() == b.encoding(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use ctxserve_core::Nvfp4Run;
    use half::bf16;

    use super::*;

    #[test]
    fn parts_are_read_one_ahead_and_no_more() {
        let (taken, read) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let order = Mutex::new(Vec::new());
        ahead(
            20,
            |part| {
                // Part `part` is begun once part `part - 2` was taken: the one between is with `take`.
                assert!(part <= taken.load(SeqCst) + 1, "{part}");
                read.fetch_add(1, SeqCst);
                Ok::<_, ()>(part)
            },
            |part| {
                order.lock().unwrap().push(part);
                // Only a reader that works beside this closure gets any further.
                while read.load(SeqCst) < (part + 2).min(20) {
                    thread::yield_now();
                }
                taken.fetch_add(1, SeqCst);
                Ok(())
            },
        )
        .unwrap();
        assert!(order.into_inner().unwrap().into_iter().eq(0..20));
    }

    #[test]
    fn the_first_error_of_either_side_ends_it() {
        let mut taken = Vec::new();
        let read = |part| if part == 3 { Err("read") } else { Ok(part) };
        let outcome = ahead(10, read, |part| {
            taken.push(part);
            Ok(())
        });
        assert_eq!((outcome, taken), (Err("read"), vec![0, 1, 2]));
        let outcome = ahead(10, Ok, |part| if part == 4 { Err("taken") } else { Ok(()) });
        assert_eq!(outcome, Err("taken"));
        assert_eq!(ahead(0, Err::<(), _>, |()| Ok(())), Ok(()));
    }

    fn f32s(values: &[f32]) -> Matrix {
        Matrix::new(values.len() / 2, 2, Elements::F32(values.to_vec())).unwrap()
    }

    #[test]
    fn fused_rows_keep_their_order() {
        let matrix = stack(vec![f32s(&[1.0, 2.0, 3.0, 4.0]), f32s(&[5.0, 6.0]), f32s(&[7.0, 8.0])]).unwrap();
        assert_eq!((matrix.rows(), matrix.cols()), (4, 2));
        assert_eq!(matrix.elements(), &Elements::F32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]));
        assert!(stack(Vec::new()).is_err());
        let wider = Matrix::new(1, 3, Elements::F32(vec![0.0; 3])).unwrap();
        assert!(stack(vec![f32s(&[1.0, 2.0]), wider]).is_err());
    }

    #[test]
    fn rows_that_are_stored_differently_become_bfloat16() {
        let nvfp4 = |factor: f32| {
            // 1 in E4M3, and the codes of 0.5 and 1.
            let runs = vec![Nvfp4Run { rows: 1, weight: factor, input: Some(3.0) }];
            let elements = Elements::Nvfp4 { codes: vec![0x21; 8], scales: vec![0x38], runs };
            Matrix::new(1, 16, elements).unwrap()
        };
        let plain = Matrix::new(1, 16, Elements::Bf16(vec![bf16::from_f32(-0.75); 16])).unwrap();
        let affine = |bits: usize, code: u8| {
            let elements = Elements::Affine {
                bits,
                group: 16,
                codes: vec![code; 2 * bits],
                scales: vec![2.0],
                offsets: vec![-1.0],
            };
            Matrix::new(1, 16, elements).unwrap()
        };
        let half = |a: f32, b: f32| [a, b].map(bf16::from_f32).repeat(8);
        for (parts, wanted) in [
            (
                vec![nvfp4(4.0), plain.clone(), nvfp4(8.0)],
                [half(2.0, 4.0), half(-0.75, -0.75), half(4.0, 8.0)],
            ),
            (
                vec![plain.clone(), nvfp4(1.0), plain.clone()],
                [half(-0.75, -0.75), half(0.5, 1.0), half(-0.75, -0.75)],
            ),
            // Bits that differ by module, as MLX's overrides have them.
            (
                vec![affine(4, 0x32), affine(8, 5), affine(4, 0)],
                [half(3.0, 5.0), half(9.0, 9.0), half(-1.0, -1.0)],
            ),
        ] {
            let matrix = stack(parts).unwrap();
            assert_eq!((matrix.rows(), matrix.cols()), (3, 16));
            assert_eq!(matrix.elements(), &Elements::Bf16(wanted.concat()));
        }
        let alike = stack(vec![nvfp4(4.0), nvfp4(8.0)]).unwrap();
        assert_eq!(alike.encoding(), Encoding::Nvfp4);
    }
}
