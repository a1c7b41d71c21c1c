//! The command line: words to calls, errors to exit codes.

pub mod pull;
