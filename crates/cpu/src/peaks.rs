//! The largest inputs of products: what factors of quantised activations are chosen by.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ctxserve_backend::Role;

/// What a matrix is for; those of one kind come in the order of the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Product {
    /// Queries, keys and values.
    Qkv,
    /// The output projection of attention.
    Output,
    /// Gate and up of a dense layer.
    GateUp,
    /// Down of a dense layer.
    Down,
    /// Embedding, head or router.
    Other,
}

/// The largest magnitude that each matrix has met in its inputs, by matrices in the order in which they were loaded. Clones
/// share what they hold.
#[derive(Clone, Debug, Default)]
pub struct InputPeaks(Arc<Mutex<Vec<(Product, Peak)>>>);

/// That of one matrix, as the bits of a float that is not negative: they are in the order of their values, and NaN comes last.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peak(Arc<AtomicU32>);

impl InputPeaks {
    /// One for each matrix. 0 where it met nothing but zeros, or nothing; not finite where an input was not.
    pub fn all(&self) -> Vec<(Product, f32)> {
        let matrices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let read =
            |(product, peak): &(Product, Peak)| (*product, f32::from_bits(peak.0.load(Ordering::Relaxed)));
        matrices.iter().map(read).collect()
    }

    pub(crate) fn add(&self, role: Role<'_>) -> Peak {
        let product = match role {
            Role::Qkv(_) => Product::Qkv,
            Role::Output(_) => Product::Output,
            Role::GateUp => Product::GateUp,
            Role::Down => Product::Down,
            Role::Embedding { .. } | Role::Router | Role::Head => Product::Other,
        };
        let peak = Peak::default();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((product, peak.clone()));
        peak
    }
}

impl Peak {
    /// Takes inputs into account.
    pub(crate) fn meet(&self, x: &[f32]) {
        let most = x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
        self.0.fetch_max(most, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use ctxserve_backend::Backend;
    use ctxserve_core::{Elements, Matrix};

    use super::*;
    use crate::backend::{CpuBackend, CpuOptions};
    use crate::linear::linear;
    use crate::rows::Rows;

    #[test]
    fn the_largest_input_of_each_matrix_is_kept() {
        for mut backend in [CpuBackend::new(CpuOptions::default()).unwrap(), CpuBackend::plain()] {
            let matrix = || Matrix::new(2, 32, Elements::F32(vec![1.0; 64])).unwrap();
            let before = backend.load_matrix(matrix(), None, Role::Router).unwrap();
            let peaks = backend.observe_inputs();
            let [a, b] =
                [Role::GateUp, Role::Down].map(|role| backend.load_matrix(matrix(), None, role).unwrap());
            let feed = |matrix, x: [f32; 2]| {
                let rows = Rows::from_vec([[x[0]; 32], [x[1]; 32]].concat(), 32);
                linear("test", backend.fast.as_ref(), matrix, &rows).unwrap();
            };
            feed(&before, [9.0, 9.0]);
            feed(&a, [1.0, -3.0]);
            feed(&a, [2.0, 0.0]);
            assert_eq!(peaks.all(), [(Product::GateUp, 3.0), (Product::Down, 0.0)]);
            feed(&b, [f32::NEG_INFINITY, 1.0]);
            feed(&a, [f32::NAN, 1e30]);
            let all = peaks.all();
            assert!(all[0].1.is_nan() && all[1].1 == f32::INFINITY, "{all:?}");
        }
    }
}
