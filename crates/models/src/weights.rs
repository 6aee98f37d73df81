//! From a checkpoint to a backend: shared by the families.

use ctxserve_backend::{Backend, Role};
use ctxserve_checkpoint::{Checkpoint, to_bf16};
use ctxserve_core::{Elements, Matrix};

use crate::{LoadError, LoadProgress};

/// Hands tensors of one checkpoint to one backend and reports each finished part.
pub(crate) struct Loader<'a, B: Backend> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) backend: &'a mut B,
    progress: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// `parts` is how many times [`Loader::finished`] will be called.
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        backend: &'a mut B,
        parts: usize,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        let state = LoadProgress { done: 0, total: parts, total_bytes: checkpoint.total_bytes() };
        Self { checkpoint, backend, progress, state }
    }

    /// Reports one more part.
    pub(crate) fn finished(&mut self) {
        self.state.done += 1;
        (self.progress)(self.state);
    }

    /// A vector `[len]`.
    pub(crate) fn vector(&mut self, name: &str, len: usize) -> Result<B::Vector, LoadError> {
        let values = self.checkpoint.vector(name, len)?;
        Ok(self.backend.load_vector(values)?)
    }

    /// A matrix `[rows, cols]` from `NAME.weight`, with its bias from `NAME.bias` when `biased`.
    pub(crate) fn linear(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
        biased: bool,
        role: Role<'_>,
    ) -> Result<B::Matrix, LoadError> {
        self.fused(&[(name.to_owned(), rows)], cols, biased, role)
    }

    /// Matrices of equal width as one, rows in the order given.
    pub(crate) fn fused(
        &mut self,
        parts: &[(String, usize)],
        cols: usize,
        biased: bool,
        role: Role<'_>,
    ) -> Result<B::Matrix, LoadError> {
        let mut matrices = Vec::with_capacity(parts.len());
        let mut bias = biased.then(Vec::new);
        for (name, rows) in parts {
            let weight = format!("{name}.weight");
            let matrix = self.checkpoint.matrix(&weight, *rows, cols)?;
            matrices.push((weight, matrix));
            if let Some(bias) = &mut bias {
                bias.extend(self.checkpoint.vector(&format!("{name}.bias"), *rows)?);
            }
        }
        let matrix = self.accepted(stack(matrices)?);
        Ok(self.backend.load_matrix(matrix, bias, role)?)
    }

    /// The matrix as the backend takes it.
    pub(crate) fn accepted(&self, matrix: Matrix) -> Matrix {
        if self.backend.accepts(matrix.encoding()) { matrix } else { to_bf16(matrix) }
    }
}

/// Puts matrices of equal width below one another.
fn stack(parts: Vec<(String, Matrix)>) -> Result<Matrix, LoadError> {
    let mut parts = parts.into_iter();
    let Some((first, top)) = parts.next() else {
        return Err(ctxserve_backend::DeviceError::new("load_matrix", "no rows to fuse").into());
    };
    let (mut rows, cols, expected) = (top.rows(), top.cols(), top.encoding());
    let mut elements = top.into_elements();
    for (name, part) in parts {
        rows += part.rows();
        let found = part.encoding();
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
            _ => return Err(LoadError::MixedEncodings { name, found, first, expected }),
        }
    }
    Matrix::new(rows, cols, elements)
        .ok_or_else(|| ctxserve_backend::DeviceError::new("load_matrix", "fused widths differ").into())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn f32s(name: &str, values: &[f32]) -> (String, Matrix) {
        (name.to_owned(), Matrix::new(values.len() / 2, 2, Elements::F32(values.to_vec())).unwrap())
    }

    #[test]
    fn fused_rows_keep_their_order() {
        let matrix =
            stack(vec![f32s("q", &[1.0, 2.0, 3.0, 4.0]), f32s("k", &[5.0, 6.0]), f32s("v", &[7.0, 8.0])])
                .unwrap();
        assert_eq!((matrix.rows(), matrix.cols()), (4, 2));
        assert_eq!(matrix.elements(), &Elements::F32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]));
    }

    #[test]
    fn fused_rows_must_be_stored_alike() {
        let short = Matrix::new(1, 2, Elements::Bf16(vec![bf16::ONE; 2])).unwrap();
        let error = stack(vec![f32s("q", &[1.0, 2.0]), ("k".to_owned(), short)]).unwrap_err();
        assert_eq!(error.to_string(), "k: stored as Bf16 while q is F32");
    }
}
