//! Checkpoints from outside: directories and memory in, tensors or a message out.

#[cfg(test)]
mod convert;
#[cfg(test)]
mod formats;
#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod fuzz_files;
#[cfg(test)]
mod malformed;
#[cfg(test)]
mod quantised;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod security;
#[cfg(test)]
mod support;
#[cfg(test)]
mod tools;
#[cfg(test)]
mod while_reading;
