//! Activations in host memory.

use ctxserve_backend::DeviceError;

/// A row-major matrix of f32 activations `[rows, cols]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    data: Vec<f32>,
    cols: usize,
}

impl Rows {
    /// All zeros.
    pub(crate) fn zeros(rows: usize, cols: usize) -> Self {
        Self { data: vec![0.0; rows * cols], cols }
    }

    /// Takes `rows * cols` values.
    pub(crate) fn from_vec(data: Vec<f32>, cols: usize) -> Self {
        debug_assert!(cols > 0 && data.len().is_multiple_of(cols));
        Self { data, cols }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.data.len().checked_div(self.cols).unwrap_or(0)
    }

    /// Elements per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..][..self.cols]
    }

    /// Some rows.
    pub(crate) fn of(&self, rows: impl Iterator<Item = usize>) -> Self {
        let mut data = Vec::new();
        rows.for_each(|row| data.extend_from_slice(self.row(row)));
        Self { data, cols: self.cols }
    }

    /// One row.
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.cols..][..self.cols]
    }

    /// All elements.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All elements.
    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Refuses rows of another shape: ops meet weights and activations that only a model's author can pair.
    pub(crate) fn expect(&self, op: &'static str, rows: usize, cols: usize) -> Result<(), DeviceError> {
        if self.cols == cols && self.rows() == rows {
            return Ok(());
        }
        let (got_rows, got_cols) = (self.rows(), self.cols);
        Err(DeviceError::new(
            op,
            format!("activations are [{got_rows}, {got_cols}], expected [{rows}, {cols}]"),
        ))
    }
}
