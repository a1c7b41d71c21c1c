//! Architectures from outside: which files there are (`registry`), what a file is (`file`), who may write to it (`permissions`), what it says
//! of itself without being run (`note`), whether the user agrees to it (`trust`), and opening it (`library`, the only dlopen of dylm), in
//! Rust or in C (`c_entry`); what either side offers beyond the frozen ABI (`extension`).
//! `check` tries a plugin out, in processes of their own (`sandbox`).

mod c_calls;
mod c_entry;
pub mod check;
pub mod extension;
pub mod file;
pub mod first_opening;
pub mod library;
pub mod note;
pub mod permissions;
pub mod registry;
pub mod sandbox;
pub mod trust;
