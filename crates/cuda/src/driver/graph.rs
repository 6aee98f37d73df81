//! Graphs: many launches recorded once, issued as one. Also marks in the stream, to wait for and to time.

use ctxserve_backend::DeviceError;
use cudarc::driver::sys;

use super::{Device, check};

/// A recorded sequence of launches.
#[derive(Debug)]
pub struct Graph {
    executable: sys::CUgraphExec,
    device: Device,
}

// SAFETY: a handle that any thread may use; launches are ordered by the stream.
unsafe impl Send for Graph {}

/// A point in the stream.
#[derive(Debug)]
pub struct Mark {
    event: sys::CUevent,
    device: Device,
}

// SAFETY: a handle that any thread may use.
unsafe impl Send for Mark {}

impl Device {
    /// Records what `body` launches, without running it.
    ///
    /// # Errors
    /// What `body` returns, or a graph that the driver refuses.
    pub fn capture(&self, body: impl FnOnce() -> Result<(), DeviceError>) -> Result<Graph, DeviceError> {
        self.begin_capture()?;
        let outcome = body();
        let graph = self.end_capture();
        outcome.and(graph)
    }

    /// From here to [`Device::end_capture`] launches are recorded, not run.
    ///
    /// # Errors
    /// A device fault.
    pub fn begin_capture(&self) -> Result<(), DeviceError> {
        self.enter("capture")?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live stream.
        check("capture", unsafe { sys::cuStreamBeginCapture_v2(self.inner.stream, mode) })
    }

    /// Ends the recording and makes it launchable.
    ///
    /// # Errors
    /// A call that cannot be captured was made meanwhile, or a device fault.
    pub fn end_capture(&self) -> Result<Graph, DeviceError> {
        let mut graph = std::ptr::null_mut();
        self.enter("capture")?;
        // SAFETY: a live stream in capture.
        check("capture", unsafe { sys::cuStreamEndCapture(self.inner.stream, &raw mut graph) })?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: a graph that was just captured.
        let made =
            check("capture", unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0) });
        // SAFETY: instantiation has copied it.
        let _ = unsafe { sys::cuGraphDestroy(graph) };
        made.map(|()| Graph { executable, device: self.clone() })
    }

    /// Whether launches are being recorded.
    pub(super) fn is_capturing(&self) -> Result<bool, DeviceError> {
        use sys::CUstreamCaptureStatus as Status;
        let mut status = Status::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: a live stream; writes one value.
        check("capture", unsafe { sys::cuStreamIsCapturing(self.inner.stream, &raw mut status) })?;
        Ok(status != Status::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Marks this point of the stream.
    ///
    /// # Errors
    /// A device fault.
    pub fn mark(&self) -> Result<Mark, DeviceError> {
        self.enter("mark")?;
        let mut event = std::ptr::null_mut();
        // SAFETY: destroyed in `Drop`.
        check("mark", unsafe { sys::cuEventCreate(&raw mut event, 0) })?;
        let mark = Mark { event, device: self.clone() };
        mark.again()?;
        Ok(mark)
    }
}

impl Graph {
    /// Issues the recorded launches.
    ///
    /// # Errors
    /// A device fault.
    pub fn launch(&self) -> Result<(), DeviceError> {
        self.device.enter("graph")?;
        // SAFETY: live handles; what the graph reads and writes is kept alive by whoever captured it.
        check("graph", unsafe { sys::cuGraphLaunch(self.executable, self.device.inner.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.enter("graph").is_ok() {
            // SAFETY: made here, destroyed once; the driver lets a running launch finish.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}

impl Mark {
    /// Moves the mark to the stream's present end.
    ///
    /// # Errors
    /// A device fault.
    pub fn again(&self) -> Result<(), DeviceError> {
        self.device.enter("mark")?;
        // SAFETY: live handles.
        check("mark", unsafe { sys::cuEventRecord(self.event, self.device.inner.stream) })
    }

    /// Waits until the stream has passed the mark.
    ///
    /// # Errors
    /// A fault of anything before it.
    pub fn wait(&self) -> Result<(), DeviceError> {
        self.device.enter("wait")?;
        // SAFETY: a live event.
        check("wait", unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// Milliseconds of device time since `earlier`; waits for this mark.
    ///
    /// # Errors
    /// A device fault.
    pub fn since(&self, earlier: &Self) -> Result<f32, DeviceError> {
        self.wait()?;
        let mut milliseconds = 0.0;
        // SAFETY: two live events that have been recorded.
        check("time", unsafe {
            sys::cuEventElapsedTime_v2(&raw mut milliseconds, earlier.event, self.event)
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.device.enter("mark").is_ok() {
            // SAFETY: made here, destroyed once.
            let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}
