//! The engine with real models on the CPU: scheduling, paging and preemption change no token.

#[cfg(test)]
mod model;
#[cfg(test)]
mod prefix;
