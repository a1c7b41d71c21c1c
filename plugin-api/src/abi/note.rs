//! The note: a JSON text in a section of the plugin's file, so that a host can tell what a plugin is without running a byte of it.
//! It is put together at compile time, since a section's content must be a constant. On ELF systems the text is wrapped as an ELF note,
//! for linkers and `readelf -n` to understand.

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
            self = self.byte(text[i]);
            i += 1;
        }
        self
    }

    const fn byte(mut self, byte: u8) -> Self {
        if N > 0 {
            self.bytes[self.len] = byte;
        }
        self.len += 1;
        self
    }

    /// A JSON string. RFC 8259, section 7.
    const fn quoted(self, text: &str) -> Self {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut w = self.byte(b'"');
        let text = text.as_bytes();
        let mut i = 0;
        while i < text.len() {
            w = match text[i] {
                c @ (b'"' | b'\\') => w.byte(b'\\').byte(c),
                c @ ..0x20 => w.put("\\u00").byte(HEX[(c >> 4) as usize]).byte(HEX[(c & 15) as usize]),
                c => w.byte(c),
            };
            i += 1;
        }
        w.byte(b'"')
    }

    const fn field(self, key: &str, value: &str) -> Self {
        self.byte(b',').quoted(key).byte(b':').quoted(value)
    }

    const fn facts(self, f: &Facts<'_>) -> Self {
        let mut w = self.put("{\"abi\":\"1.0\",\"model_types\":[");
        let mut i = 0;
        while i < f.model_types.len() {
            w = w.put(if i == 0 { "" } else { "," }).quoted(f.model_types[i]);
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

/// The name of the note's vendor, as ELF has it: with its closing zero, in whole words.
pub const VENDOR: [u8; 8] = *b"dylm\0\0\0\0";
/// The bytes before the text of an ELF note: lengths of name and text, type, name.
pub const HEADER_ELF: usize = 3 * 4 + VENDOR.len();

/// The note as it lies in the section; `N` comes from [`measure`]. On ELF systems: System V ABI, chapter 5, "Note Section".
#[repr(C)]
#[allow(dead_code, reason = "read from the file, by others")]
pub struct Note<const N: usize> {
    #[cfg(not(any(windows, target_vendor = "apple")))]
    header: ElfHeader,
    text: [u8; N],
    /// `repr(C)` brings the whole to a multiple of 4 with it, so that a next note would find its place.
    _words: [u32; 0],
}

#[cfg(not(any(windows, target_vendor = "apple")))]
#[repr(C)]
#[allow(dead_code, reason = "read from the file, by others")]
struct ElfHeader {
    name_size: u32,
    text_size: u32,
    kind: u32,
    name: [u8; VENDOR.len()],
}

impl<const N: usize> Note<N> {
    /// The note that states these facts.
    pub const fn new(facts: &Facts<'_>) -> Self {
        Note {
            #[cfg(not(any(windows, target_vendor = "apple")))]
            header: ElfHeader { name_size: 5, text_size: N as u32, kind: 1, name: VENDOR },
            text: write(facts),
            _words: [],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_json_reserves_are_escaped() {
        const FACTS: Facts<'static> = Facts {
            name: "quote\"back\\slash",
            version: "1.0.0",
            license: "line\nend \u{1}",
            url: "müsli",
            model_types: &["a", "b"],
            panic: "unwind",
        };
        const TEXT: [u8; measure(&FACTS)] = write(&FACTS);
        let json: serde_json::Value = serde_json::from_slice(&TEXT).unwrap();
        assert_eq!(json["name"], FACTS.name);
        assert_eq!(json["license"], FACTS.license);
        assert_eq!(json["url"], FACTS.url);
        assert_eq!(json["model_types"], serde_json::json!(["a", "b"]));
    }
}
