//! Where the time of a step goes: with `CTXSERVE_KERNEL_TIMES=1` in the environment every launch is followed by a mark, and each step
//! that is waited for prints one line: microseconds from the first launch to the last, then each kernel's launches and
//! microseconds. Marks keep launches from overlapping, and a recorded step has none inside: run with `--enforce-eager`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

use ctxserve_backend::DeviceError;

use super::{Device, Mark};

/// Marks since the last report, if they are wanted.
#[derive(Debug)]
pub(super) struct Times(Option<Mutex<Vec<(&'static str, Mark)>>>);

impl Default for Times {
    fn default() -> Self {
        let wanted = std::env::var_os("CTXSERVE_KERNEL_TIMES").is_some_and(|value| value == "1");
        Self(wanted.then(Mutex::default))
    }
}

impl Device {
    /// Marks the end of a launch.
    pub(super) fn note_launch(&self, name: &'static str) -> Result<(), DeviceError> {
        let Some(marks) = &self.inner.times.0 else { return Ok(()) };
        if self.is_capturing()? {
            return Ok(());
        }
        let mark = self.mark()?;
        marks.lock().unwrap_or_else(PoisonError::into_inner).push((name, mark));
        Ok(())
    }

    /// Prints what was launched since the last time.
    pub(crate) fn report_times(&self) -> Result<(), DeviceError> {
        let Some(marks) = &self.inner.times.0 else { return Ok(()) };
        // Taken out first: a mark that is dropped enters the driver.
        let marks = std::mem::take(&mut *marks.lock().unwrap_or_else(PoisonError::into_inner));
        let mut kernels: BTreeMap<&str, (usize, f32)> = BTreeMap::new();
        for pair in marks.windows(2) {
            let [(_, before), (name, after)] = pair else { continue };
            let entry = kernels.entry(name).or_default();
            entry.0 += 1;
            entry.1 += 1e3 * after.since(before)?;
        }
        let mut kernels: Vec<_> = kernels.into_iter().collect();
        kernels.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        let total: f32 = kernels.iter().map(|(_, (_, us))| us).sum();
        let mut line = format!("kernel times: {total:.0} us");
        for (name, (count, us)) in kernels {
            // Writing to a string cannot fail.
            let _ = write!(line, "; {name} {count} {us:.0}");
        }
        if !marks.is_empty() {
            // Standard error, beside the log: who asks for this reads it in a terminal.
            eprintln!("{line}");
        }
        Ok(())
    }
}
