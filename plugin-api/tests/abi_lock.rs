//! plugin-api -> the text `abi.lock`: every op, object, field, number and name that crosses between host and plugin, one line each, as the
//! compiler has laid it out. A line that is in the file and not in the text is a break of ABI 1, and fails; a line that is only in the text
//! is growth, and asks to be written down: `DYLM_ABI_LOCK=append cargo test -p plugin-api --test abi_lock`.

#![cfg(target_pointer_width = "64")]

use abi_stable::{
    StableAbi,
    library::LibHeader,
    type_layout::{TLData, TLField, TLFields, TypeLayout},
};
use plugin_api::abi::{
    self, AttendSpec, BlockChoiceSpec, ExpertsSpec, c,
    later::{ASKS_ELF, ASKS_MACHO, ASKS_PE, NEEDS_ELF, NEEDS_MACHO, NEEDS_PE},
    note::{self, Facts, SECTION_ELF, SECTION_MACHO, SECTION_PE, VENDOR},
    ops::{OpsRef, PARAMETERS},
    root::FactoryRef,
};
use std::{
    fs,
    mem::offset_of,
    path::{Path, PathBuf},
};

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Structs that ops take and that later versions extend at their ends.
const GROWING: [&TypeLayout; 3] =
    [<AttendSpec as StableAbi>::LAYOUT, <BlockChoiceSpec as StableAbi>::LAYOUT, <ExpertsSpec as StableAbi>::LAYOUT];

/// Everything that crosses.
fn dump() -> Vec<String> {
    let mut lines = vec![
        format!("abi {}", abi::MAJOR),
        format!(
            "symbol {}: abi_stable's LibHeader, {} bytes",
            String::from_utf8_lossy(abi::SYMBOL).trim_end_matches('\0'),
            size_of::<LibHeader>()
        ),
        format!("note section: ELF {SECTION_ELF}, Mach-O __DATA,{SECTION_MACHO}, PE {SECTION_PE}"),
        format!("note vendor on ELF: {:?}, type 1", String::from_utf8_lossy(&VENDOR)),
        format!("note section of ops that are called: ELF {NEEDS_ELF}*, Mach-O __DATA,{NEEDS_MACHO}, PE {NEEDS_PE}"),
        format!("note section of ops that are asked for: ELF {ASKS_ELF}*, Mach-O __DATA,{ASKS_MACHO}, PE {ASKS_PE}"),
    ];
    lines.extend(note_keys());
    let mut types = Types { seen: Vec::new(), lines: Vec::new() };
    for layout in [<OpsRef as StableAbi>::LAYOUT, <FactoryRef as StableAbi>::LAYOUT] {
        types.add(layout);
    }
    GROWING.into_iter().for_each(|spec| types.add(spec));
    lines.extend(types.lines);
    lines.extend(structs(&types.seen));
    lines.extend(constants());
    lines.extend(plain_c());
    let mut sorted = lines.clone();
    sorted.sort();
    sorted.dedup();
    assert_eq!(sorted.len(), lines.len(), "two lines that are alike");
    lines
}

/// The note's keys in the order in which they stand.
fn note_keys() -> Vec<String> {
    const FACTS: Facts<'static> =
        Facts { name: "n", version: "1.0.0", license: "l", url: "u", model_types: &["m"], panic: "unwind" };
    const TEXT: [u8; note::measure(&FACTS)] = note::write(&FACTS);
    let text = std::str::from_utf8(&TEXT).unwrap();
    let note: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text).unwrap();
    // This map sorts its keys.
    let mut keys: Vec<(usize, &String, &serde_json::Value)> =
        note.iter().map(|(key, value)| (text.find(&format!("\"{key}\":")).unwrap(), key, value)).collect();
    keys.sort_by_key(|key| key.0);
    let kind = |value: &serde_json::Value| if value.is_array() { "list of strings" } else { "string" };
    keys.into_iter().map(|(_, key, value)| format!("note key {key}: {}", kind(value))).collect()
}

/// Types as they are laid out, each once, those that it is made of right after it.
struct Types {
    seen: Vec<String>,
    lines: Vec<String>,
}

impl Types {
    fn add(&mut self, layout: &'static TypeLayout) {
        let name = called(layout);
        if layout.size() == 0 || self.seen.contains(&name) {
            return;
        }
        self.seen.push(name.clone());
        let (size, align) = (layout.size(), layout.alignment());
        match layout.data() {
            TLData::Primitive(_) => {}
            TLData::Opaque => self.lines.push(format!("type {name}: {size} bytes, aligned to {align}")),
            TLData::PrefixType(prefix) => {
                for (nth, field) in prefix.fields.iter().enumerate() {
                    let since = if nth < usize::from(prefix.first_suffix_field) { "" } else { ", later than 1.0" };
                    self.lines.push(format!("table {name} {nth} {}{since}", entry(&field)));
                }
                self.inside(prefix.fields);
            }
            TLData::Struct { fields } => {
                // A spec may grow at its end, so its size is no promise.
                self.lines.push(match GROWING.iter().any(|spec| called(spec) == name) {
                    true => format!("struct {name}: grows at its end, aligned to {align}"),
                    false => format!("struct {name}: {size} bytes, aligned to {align}"),
                });
                let mut offset = 0usize;
                for field in fields.iter().filter(|field| field.layout().size() > 0) {
                    let inner = field.layout();
                    offset = offset.next_multiple_of(inner.alignment().max(1));
                    self.lines.push(format!("struct {name} at {offset} {}", entry(&field)));
                    offset += inner.size();
                }
                self.inside(fields);
            }
            TLData::Union { fields } => {
                self.lines.push(format!("union {name}: {size} bytes, aligned to {align}"));
                fields.iter().for_each(|field| self.lines.push(format!("union {name} {}", entry(&field))));
                self.inside(fields);
            }
            TLData::Enum(variants) => {
                let names = variants.variant_names.as_str().trim_end_matches(';').replace(';', ", ");
                self.lines.push(format!("enum {name}: {size} bytes, aligned to {align}: {names}"));
                let named = names.split(", ").flat_map(|variant| {
                    let count = variants.field_count.get(names.split(", ").position(|v| v == variant).unwrap());
                    std::iter::repeat_n(variant, usize::from(*count.unwrap()))
                });
                for (variant, field) in named.zip(variants.fields.iter()) {
                    self.lines.push(format!("enum {name} {variant} {}", entry(&field)));
                }
                self.inside(variants.fields);
            }
        }
        self.inside(layout.phantom_fields());
    }

    fn inside(&mut self, fields: TLFields) {
        for field in fields.iter() {
            self.add(field.layout());
            for function in field.function_range().iter() {
                function
                    .param_type_layouts
                    .iter()
                    .chain(function.return_type_layout())
                    .for_each(|layout| self.add(layout()));
            }
        }
    }
}

/// A type with its parameters, which the layouts of some do not name.
fn called(layout: &'static TypeLayout) -> String {
    let name = layout.full_type().to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    let name = name.replace("<'a>", "").replace("<'a, ", "<").replace("&'a ", "&").replace(" >", ">");
    let inner = |nth: usize| match layout.data() {
        TLData::Struct { fields } => fields.get(nth).map(|field| called(field.layout())),
        TLData::Enum(variants) => variants.fields.get(nth).map(|field| called(field.layout())),
        _ => None,
    };
    match (name.as_str(), inner(0), inner(1)) {
        ("RSlice", Some(data), _) => format!("RSlice<{}>", data.trim_start_matches("*const ")),
        ("RVec", Some(buffer), _) => buffer.replace("NonNull", "RVec"),
        ("RResult", Some(ok), Some(err)) => format!("RResult<{ok}, {err}>"),
        _ => name,
    }
}

/// A field with its type; a function with those of its parameters.
fn entry(field: &TLField) -> String {
    let Some(function) = field.function_range().iter().next() else {
        return format!("{}: {}, {} bytes", field.name(), called(field.layout()), field.layout().size());
    };
    // The layout knows the types, but not what the parameters are called, and two of one type must not change places.
    let op = PARAMETERS.iter().find(|(op, _)| *op == field.name()).map_or(&[][..], |(_, names)| names);
    let takes = function.param_type_layouts.iter().enumerate().map(|(nth, layout)| {
        let name = nth.checked_sub(1).and_then(|nth| op.get(nth)).map(|name| format!("{name}: ")).unwrap_or_default();
        name + &called(layout())
    });
    let takes = takes.collect::<Vec<_>>().join(", ");
    let gives = function.return_type_layout().map(|layout| format!(" -> {}", called(layout()))).unwrap_or_default();
    format!("{}: extern \"C\" fn({takes}){gives}", field.name())
}

fn sources() -> Vec<(String, String)> {
    let mut files: Vec<PathBuf> = fs::read_dir(here().join("src/abi")).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    files.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// The structs that no op and no frozen object leads to, as the sources have them: those of named extensions.
fn structs(seen: &[String]) -> Vec<String> {
    let mut lines = Vec::new();
    for (_, text) in sources() {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for part in code.split("#[repr(C)]").skip(1) {
            let Some((head, rest)) = part.split_once("pub struct ").and_then(|(_, part)| part.split_once(" {\n"))
            else {
                continue;
            };
            let name = head.split('<').next().unwrap();
            let known = |seen: &String| seen.split(['<', '>']).any(|word| word == name);
            if head.contains('$') || seen.iter().any(known) {
                continue;
            }
            let fields = rest.split("\n}").next().unwrap();
            let code = fields.lines().map(str::trim).filter(|line| !line.starts_with("//") && !line.starts_with('#'));
            // A function with many parameters goes over several lines.
            let whole = code.collect::<Vec<_>>().join(" ").replace("( ", "(").replace(", )", ")");
            for (nth, field) in whole.split("pub ").filter(|field| !field.trim().is_empty()).enumerate() {
                lines.push(format!("struct {head}, repr(C), {nth}: {}", field.trim().trim_end_matches(',')));
            }
        }
    }
    lines
}

/// The entry for plain C: where each op and each field lies.
fn plain_c() -> Vec<String> {
    let symbol = String::from_utf8_lossy(c::SYMBOL).trim_end_matches('\0').to_owned();
    let mut lines = vec![format!("symbol {symbol}: dylm.h's dylm_plugin")];
    for (table, places) in c::ops::TABLES {
        lines.extend(places.iter().map(|(op, place)| format!("c table {table} at {place} {op}")));
    }
    macro_rules! fields {
        ($($ty:ident: $($field:ident),*;)*) => {$(
            $(lines.push(format!(concat!("c ", stringify!($ty), " at {} ", stringify!($field)), offset_of!(c::$ty, $field)));)*
        )*};
    }
    fields! {
        Host: size, major, minor, build, layers, tensors, config, error, failed, extension;
        ConfigOps: size, whole, number, flag, text, json, count;
        Model: size, data, caches, cache_count, forward, head, drop, extension;
        Plugin: size, major, minor, note, create, extension;
        Text: start, len;
        Lent: size, start;
        Step: data, run;
    }
    lines.push(format!("c frozen: Model {} bytes, Plugin {} bytes", size_of::<c::Model>(), size_of::<c::Plugin>()));
    lines
}

/// The numbers with a meaning, and the names of extensions, as the sources have them.
fn constants() -> Vec<String> {
    let mut lines = Vec::new();
    for (file, text) in sources() {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for line in code.lines().map(str::trim) {
            let Some((name, value)) =
                line.strip_prefix("pub const ").and_then(|l| l.strip_suffix(';')?.split_once(": "))
            else {
                continue;
            };
            if name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
                && ["u32 = ", "usize = "].iter().any(|of| value.starts_with(of))
            {
                // The minor grows with every line that is appended here.
                let minor = file == "mod.rs" && name == "MINOR";
                lines.extend((!minor).then(|| format!("const {name}: {value}")));
            }
        }
        let ids = code.lines().filter_map(|line| line.trim().strip_prefix("const ID: ")?.split('"').nth(1));
        lines.extend(ids.filter(|id| !id.contains(':')).map(|id| format!("extension {id}")));
    }
    assert!(lines.len() > 20, "{} constants: the sources are no longer read right", lines.len());
    lines
}

/// What differs: lines of the lock that are no more, and lines that it does not have yet.
fn compare<'a>(lock: &'a [String], now: &'a [String]) -> (Vec<&'a str>, Vec<&'a str>) {
    let missing = |from: &'a [String], of: &'a [String]| {
        from.iter().filter(|line| !of.contains(line)).map(String::as_str).collect::<Vec<_>>()
    };
    (missing(lock, now), missing(now, lock))
}

const OPENING: &str =
    "# What crosses between a host and a plugin of ABI 1, one line each: written and checked by tests/abi_lock.rs.
# Lines are only ever appended: a plugin that somebody built on any day of ABI 1 relies on each of them.
";

#[test]
fn nothing_that_crosses_has_changed_since_it_was_written_down() {
    let (path, now) = (here().join("abi.lock"), dump());
    let mode = std::env::var("DYLM_ABI_LOCK").unwrap_or_default();
    let lock = fs::read_to_string(&path).unwrap_or_default();
    let lock: Vec<String> = lock.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    let (gone, new) = compare(&lock, &now);
    assert!(
        gone.is_empty(),
        "abi.lock has lines that are no longer true: this breaks every plugin of ABI {}. Take the change back, append an op or a field \
         instead, or name an extension anew.\n- {}\n{}",
        abi::MAJOR,
        gone.join("\n- "),
        new.iter().map(|line| format!("+ {line}\n")).collect::<String>(),
    );
    if mode == "append" {
        fs::write(&path, format!("{OPENING}{}\n", now.join("\n"))).unwrap();
    } else {
        assert!(
            new.is_empty(),
            "what crosses has grown; if it is meant to, DYLM_ABI_LOCK=append cargo test -p plugin-api --test abi_lock\n+ {}",
            new.join("\n+ ")
        );
    }
}

#[test]
fn a_changed_a_removed_and_a_moved_line_are_told_from_an_appended_one() {
    let lock = |lines: &[&str]| lines.iter().map(|l| (*l).to_owned()).collect::<Vec<String>>();
    let old = lock(&["table T 0 a: fn(x: u32)", "table T 1 b: fn(x: u32)"]);
    let none: Vec<&str> = Vec::new();
    assert_eq!(compare(&old, &old), (none.clone(), none.clone()));
    let appended = lock(&["table T 0 a: fn(x: u32)", "table T 1 b: fn(x: u32)", "table T 2 c: fn(x: u32)"]);
    assert_eq!(compare(&old, &appended), (none.clone(), vec!["table T 2 c: fn(x: u32)"]));
    for broken in [
        &["table T 0 a: fn(x: u32)"][..],
        &["table T 0 a: fn(x: u32)", "table T 1 b: fn(x: u64)"],
        &["table T 0 b: fn(x: u32)", "table T 1 a: fn(x: u32)"],
    ] {
        assert!(!compare(&old, &lock(broken)).0.is_empty(), "{broken:?}");
    }
}

#[test]
fn every_struct_that_may_grow_crosses_with_its_size_in_front() {
    let lines = dump();
    let has = |line: &str| lines.iter().any(|l| l.starts_with(line));
    assert!(has("struct SpecRef at 0 size: u64, 8 bytes"), "{lines:#?}");
    assert!(has("struct SpecRef at 8 start: "));
    let growing: Vec<&str> =
        lines.iter().filter(|line| line.contains("grows at its end")).map(String::as_str).collect();
    let spec = sources().into_iter().find(|(file, _)| file == "spec.rs").unwrap().1;
    assert_eq!(growing.len(), spec.split("#[cfg(test)]").next().unwrap().matches(" Grows for ").count(), "{growing:?}");
    // No function takes one of these, or anything else that is not frozen, by a pointer without a size.
    let first_hand = |line: &&String| line.contains("extern \"C\" fn(") && !line.contains(", repr(C), ");
    for line in lines.iter().filter(first_hand) {
        let rest = ["&Host", "*const ()", "*mut ()", "-> *const"]
            .iter()
            .fold(line.clone(), |line, known| line.replace(known, ""));
        assert!(!rest.contains(['&', '*']), "{line}");
    }
    assert!(has("struct Host: 24 bytes"), "the host object is frozen: its growth is named extensions");
}

#[test]
fn no_op_gives_an_address_or_anything_that_must_be_freed() {
    let lines = dump();
    let ops: Vec<&String> =
        lines.iter().filter(|line| line.starts_with("table ") && line.contains("fn(Ctx, ")).collect();
    assert!(ops.len() > 80, "{} ops", ops.len());
    for op in ops {
        let (takes, gives) = op.split_once("fn(Ctx, ").unwrap().1.split_once("At)").unwrap();
        let gives = gives.trim_end_matches(", later than 1.0").trim_start_matches(" -> ");
        assert!(["", "Handle", "Pair", "Slot", "SourceId", "u8"].contains(&gives), "{op}");
        // Texts and lists are borrowed: the types that own theirs are others.
        assert!(!["RString", "RVec", "RBox", "RArc"].iter().any(|owner| takes.contains(owner)), "{op}");
    }
}
