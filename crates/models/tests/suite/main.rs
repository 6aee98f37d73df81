//! Everything that needs files, a backend or a whole configuration.

#[cfg(test)]
mod calibrated;
#[cfg(test)]
mod common;
#[cfg(test)]
mod config;
#[cfg(test)]
mod config_fuzz;
#[cfg(test)]
mod demo;
#[cfg(test)]
mod goldens;
#[cfg(test)]
mod ledger;
#[cfg(test)]
mod loading;
#[cfg(test)]
mod mixed;
#[cfg(test)]
mod quantising;
#[cfg(test)]
mod qwen3;
