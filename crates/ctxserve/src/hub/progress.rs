//! Who is told how a download goes.

use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};

/// Hears about one file after another.
pub trait Progress {
    /// A file begins: its size if known, and bytes kept from an earlier attempt.
    fn begin(&self, file: &str, size: Option<u64>, kept: u64);
    /// Bytes of the file that are on disk now.
    fn at(&self, bytes: u64);
    /// The file is complete.
    fn end(&self);
}

/// Tells nobody.
#[derive(Debug)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: Option<u64>, _: u64) {}
    fn at(&self, _: u64) {}
    fn end(&self) {}
}

/// One bar a file on standard error; log lines where that is no terminal.
#[derive(Debug, Default)]
pub struct Bars {
    current: Mutex<Option<ProgressBar>>,
}

const TEMPLATE: &str = "{msg:40!} {bar:30} {bytes:>11} / {total_bytes:<11} {bytes_per_sec:>12} {eta:>5}";

impl Progress for Bars {
    fn begin(&self, file: &str, size: Option<u64>, kept: u64) {
        if kept > 0 {
            tracing::info!("downloading {file}, resuming at byte {kept}");
        } else {
            tracing::info!("downloading {file}");
        }
        let bar = size.map_or_else(ProgressBar::no_length, ProgressBar::new).with_message(file.to_owned());
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style);
        }
        bar.set_position(kept);
        bar.reset_eta();
        self.set(Some(bar));
    }

    fn at(&self, bytes: u64) {
        if let Ok(current) = self.current.lock()
            && let Some(bar) = &*current
        {
            bar.set_position(bytes);
        }
    }

    fn end(&self) {
        self.set(None);
    }
}

impl Bars {
    fn set(&self, bar: Option<ProgressBar>) {
        if let Ok(mut current) = self.current.lock()
            && let Some(done) = std::mem::replace(&mut *current, bar)
        {
            done.finish();
        }
    }
}
