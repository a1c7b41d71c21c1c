//! Architectures from outside: which files there are (`registry`), what they say of themselves without being run (`note`), and opening one
//! (`library`, the only dlopen of dylm); what either side offers beyond the frozen ABI (`extension`). `check` tries a plugin out, in
//! processes of their own (`sandbox`).

pub mod check;
pub mod extension;
pub mod library;
pub mod note;
pub mod registry;
pub mod sandbox;
