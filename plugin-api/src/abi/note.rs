//! The note: a JSON text in a section of the plugin's file, so that a host can tell what a plugin is without running a byte of it.
//! It is put together at compile time, since a section's content must be a constant.

/// The section that holds the note on ELF systems.
pub const SECTION_ELF: &str = ".note.dylm";
/// The same on macOS, in the segment `__DATA`.
pub const SECTION_MACHO: &str = "__dylm";
/// The same on Windows.
pub const SECTION_PE: &str = ".dylm";

/// The compiler that built this crate, and so the plugin.
pub const RUSTC: &str = env!("DYLM_RUSTC");
/// The target it was built for.
pub const TARGET: &str = env!("DYLM_TARGET");

/// What a note says, before it is text.
pub struct Facts<'a> {
    /// Cargo package name of the plugin.
    pub name: &'a str,
    /// Its version.
    pub version: &'a str,
    /// Its licence, in SPDX words.
    pub license: &'a str,
    /// Where it lives.
    pub url: &'a str,
    /// The `model_type`s that it serves.
    pub model_types: &'a [&'a str],
    /// "unwind" or "abort".
    pub panic: &'a str,
}

/// A text being written into a fixed array, or only measured where the array is empty.
struct Writer<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Writer<N> {
    const fn put(mut self, text: &str) -> Self {
        let text = text.as_bytes();
        let mut i = 0;
        while i < text.len() {
            if N > 0 {
                // JSON's own characters cannot occur in package metadata that cargo accepts, save in a licence or url typed by hand.
                self.bytes[self.len] = text[i];
            }
            self.len += 1;
            i += 1;
        }
        self
    }

    const fn field(self, key: &str, value: &str) -> Self {
        self.put(",\"").put(key).put("\":\"").put(value).put("\"")
    }

    const fn facts(self, f: &Facts<'_>) -> Self {
        let mut w = self.put("{\"abi\":\"1.0\",\"model_types\":[");
        let mut i = 0;
        while i < f.model_types.len() {
            w = w.put(if i == 0 { "\"" } else { ",\"" }).put(f.model_types[i]).put("\"");
            i += 1;
        }
        w.put("],\"needs\":[]")
            .field("name", f.name)
            .field("version", f.version)
            .field("license", f.license)
            .field("url", f.url)
            .field("rustc", RUSTC)
            .field("target", TARGET)
            .field("panic", f.panic)
            .put("}")
    }
}

/// The length of the note's text in bytes.
pub const fn measure(facts: &Facts<'_>) -> usize {
    Writer::<0> { bytes: [], len: 0 }.facts(facts).len
}

/// The note's text; `N` comes from [`measure`].
pub const fn write<const N: usize>(facts: &Facts<'_>) -> [u8; N] {
    Writer::<N> { bytes: [0; N], len: 0 }.facts(facts).bytes
}
