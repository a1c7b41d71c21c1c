//! plugin-api's ABI sources -> `plugin-api/dylm.h`: constants, structs and ops with their docs, put into the text of `dylm.h.in`.
//!
//! Read as text, for a macro sees no docs of constants: each declaration there is one that `///` lines stand before. An op that is appended
//! in Rust so is in C too, once `cargo run -p tests --bin c-header` has run; a test says when it has not.

use crate::tiny::Result;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// Constants that cross, by how their names begin.
const CONSTANTS: [&str; 6] = ["ERROR_", "CACHE_", "TRANSFORM_", "NORM_", "EXPERTS_", "ATTEND_"];
/// Structs that cross, and what C calls them: `AttendSpec` is `dylm_attend_spec`. Every field is as wide as a natural alignment asks for, so
/// no compiler pads them.
fn specs() -> &'static [(String, String)] {
    static SPECS: OnceLock<Vec<(String, String)>> = OnceLock::new();
    SPECS.get_or_init(|| {
        let texts = ["mod.rs", "spec.rs"].map(|file| fs::read_to_string(abi().join(file)).unwrap_or_default());
        let lines = texts.iter().flat_map(|text| text.lines());
        let names = lines.filter_map(|line| line.strip_prefix("pub struct ")?.strip_suffix(" {"));
        let snake = |name: &str| {
            let parts =
                name.chars().map(|c| if c.is_uppercase() { format!("_{}", c.to_lowercase()) } else { c.into() });
            format!("dylm{}", parts.collect::<String>())
        };
        names.filter(|name| name.ends_with("Spec")).map(|name| (name.to_owned(), snake(name))).collect()
    })
}

/// Where the header lies.
pub fn path() -> PathBuf {
    abi().join("../../dylm.h")
}

fn abi() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugin-api/src/abi")
}

/// The header's text.
///
/// # Errors
/// If a declaration has a type that C is not taught yet.
pub fn text() -> Result<String> {
    text_of(|_, text| text)
}

/// The header of another plugin-api: `change` gets each of its files with its name below `abi`.
pub fn text_of(change: impl Fn(&str, String) -> String) -> Result<String> {
    let read = |file: &str| {
        let text = fs::read_to_string(abi().join(file)).map_err(|e| format!("{file}: {e}"))?;
        Ok::<_, String>(change(file, text))
    };
    let (numbers, specs, root, ops) = (read("mod.rs")?, read("spec.rs")?, read("root.rs")?, read("ops.rs")?);
    let tables = tables(&ops)?;
    let number = |name: &str| {
        let start = format!("pub const {name}: u32 = ");
        let line = numbers.lines().find_map(|line| line.strip_prefix(&start));
        Ok::<_, String>(line.ok_or(start)?.trim_end_matches(';').to_owned())
    };
    let parts = [
        ("@MAJOR@", number("MAJOR")?),
        ("@MINOR@", number("MINOR")?),
        ("@CONSTANTS@", constants(&root) + &constants(&numbers)),
        ("@STRUCTS@", structs(&(numbers.clone() + &specs))?),
        ("@TABLES@", tables.iter().map(Table::declaration).collect::<Vec<_>>().join("\n")),
        ("@WORDS@", tables.iter().flat_map(|table| table.ops.iter().map(|op| op.word(table))).collect()),
    ];
    let template = read("c/dylm.h.in")?;
    Ok(parts.iter().fold(template, |text, (mark, part)| text.replace(mark, part)))
}

/// The names that Rust's docs have for what C calls otherwise.
fn doc(line: &str) -> String {
    let renamed = specs().iter().fold(line.to_owned(), |line, (rust, c)| line.replace(rust, c));
    let renamed = renamed.replace("`SourceId::NONE`", "DYLM_NO_STORED").replace("`Handle::NONE`", "no tensor");
    let renamed = renamed.replace("u32::MAX", "UINT32_MAX").replace("u64::MAX", "UINT64_MAX");
    CONSTANTS.iter().fold(renamed, |line, start| line.replace(start, &format!("DYLM_{start}")))
}

/// Declarations with the comment lines before them: `///`, or `//` where a macro takes no docs.
fn declarations(source: &str) -> Vec<(Vec<String>, String)> {
    let (mut found, mut docs, mut open) = (Vec::new(), Vec::new(), String::new());
    for line in source.lines().map(str::trim) {
        match line.strip_prefix("///").or_else(|| line.strip_prefix("// ").filter(|text| !text.starts_with("----"))) {
            Some(text) => docs.push(text.trim().to_owned()),
            None if line.is_empty() || line.starts_with("//") => docs.clear(),
            None if line.starts_with("#[") => {}
            None => {
                open = if open.is_empty() { line.to_owned() } else { format!("{open} {line}") };
                // An op may be too long for a line.
                if line.contains(" = /// ")
                    || line.ends_with([';', ',', '{', '}', ')']) && !(line.ends_with(',') && open.contains("fn "))
                {
                    found.push((std::mem::take(&mut docs), std::mem::take(&mut open)));
                }
            }
        }
    }
    found
}

fn comment(docs: &[String], indent: &str) -> String {
    docs.iter().map(|line| format!("{indent}/// {}\n", doc(line))).collect()
}

fn constants(source: &str) -> String {
    let mut text = String::new();
    for (docs, line) in declarations(source) {
        let Some((name, value)) = line.strip_prefix("pub const ").and_then(|rest| rest.split_once(": u32 = ")) else {
            continue;
        };
        if CONSTANTS.iter().any(|start| name.starts_with(start)) {
            text += &comment(&docs, "");
            text += &format!("#define DYLM_{name} {}u\n", value.trim_end_matches(';'));
        }
    }
    text
}

fn structs(source: &str) -> Result<String> {
    let (all, mut text) = (declarations(source), String::new());
    for (rust, c) in specs() {
        let mut lines = all.iter().skip_while(|(_, line)| *line != format!("pub struct {rust} {{"));
        let (docs, _) = lines.next().ok_or_else(|| format!("no struct {rust}"))?;
        text += &format!("{}typedef struct {c} {{\n", comment(docs, ""));
        let mut size = 0;
        for (docs, line) in lines.take_while(|(_, line)| line != "}") {
            let field = line.strip_prefix("pub ").and_then(|field| field.trim_end_matches(',').split_once(": "));
            let (name, ty) = field.ok_or_else(|| format!("{rust}: {line}"))?;
            let (ty, count) = match ty.strip_prefix('[').and_then(|array| array.trim_end_matches(']').split_once("; "))
            {
                Some((ty, count)) => (ty, count.parse::<usize>()?),
                None => (ty, 1),
            };
            let (width, c) = match ty {
                "u32" => (4, "uint32_t"),
                "f32" => (4, "float"),
                "u64" => (8, "uint64_t"),
                "Handle" => (8, "dylm_tensor"),
                other => return Err(format!("{rust}.{name}: what is {other} in C?").into()),
            };
            size += width * count;
            let count = if count > 1 { format!("[{count}]") } else { String::new() };
            text += &format!("{}    {c} {name}{count};\n", comment(docs, "    "));
        }
        text += &format!("}} {c};\nDYLM_ASSERT(sizeof({c}) == {size});\n\n");
    }
    Ok(text)
}

struct Table {
    docs: Vec<String>,
    /// As the host struct has it: `build`.
    name: String,
    ops: Vec<Op>,
}

struct Op {
    docs: Vec<String>,
    name: String,
    arguments: Vec<(String, Type)>,
    returns: Type,
    /// Whether it came after 1.0.
    later: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Type {
    Nothing,
    /// Rust's name, C's name where it crosses, C's name for authors.
    Number(&'static str, &'static str, &'static str),
    Text,
    /// C's name of an entry.
    List(&'static str),
    /// C's name of the struct.
    Lent(&'static str),
    /// C's name of a struct that crosses as it is.
    Struct(&'static str),
    Pair,
}

const NUMBERS: [Type; 7] = [
    Type::Number("u8", "uint8_t", "int"),
    Type::Number("u32", "uint32_t", "uint32_t"),
    Type::Number("u64", "uint64_t", "uint64_t"),
    Type::Number("f64", "double", "double"),
    Type::Number("Handle", "uint64_t", "dylm_tensor"),
    Type::Number("Slot", "uint32_t", "dylm_layer"),
    Type::Number("SourceId", "uint32_t", "dylm_stored"),
];

impl Type {
    /// `docs` say which struct a `SpecRef` leads to.
    fn of(rust: &str, docs: &[String]) -> Result<Self> {
        if let Some(number) = NUMBERS.into_iter().find(|ty| matches!(ty, Type::Number(name, ..) if *name == rust)) {
            return Ok(number);
        }
        Ok(match rust {
            "()" => Type::Nothing,
            "Pair" => Type::Pair,
            "RStr<'_>" => Type::Text,
            "ScanStep" => Type::Struct("dylm_scan_step"),
            "RSlice<'_, u32>" => Type::List("uint32_t"),
            "RSlice<'_, u64>" => Type::List("uint64_t"),
            "RSlice<'_, f32>" => Type::List("float"),
            "RSlice<'_, SourceId>" => Type::List("dylm_stored"),
            "RSlice<'_, Slot>" => Type::List("dylm_layer"),
            "RSlice<'_, Handle>" => Type::List("dylm_tensor"),
            "SpecRef<'_>" => {
                let said = specs().iter().find(|(rust, _)| docs.join(" ").contains(&format!("`{rust}`")));
                Type::Lent(&said.ok_or("an op's doc does not say which struct its spec is")?.1)
            }
            other => return Err(format!("what is {other} in C?").into()),
        })
    }

    fn raw(self) -> &'static str {
        match self {
            Type::Nothing => "void",
            Type::Number(_, raw, _) | Type::Struct(raw) => raw,
            Type::Text => "dylm_text",
            Type::List(_) => "dylm_list",
            Type::Lent(_) => "dylm_lent",
            Type::Pair => "dylm_raw_pair",
        }
    }

    fn parameter(self, name: &str) -> String {
        match self {
            Type::Nothing | Type::Pair => String::new(),
            Type::Number(_, _, ty) | Type::Struct(ty) => format!("{ty} {name}"),
            Type::Text => format!("const char *{name}"),
            Type::List(entry) => format!("const {entry} *{name}, size_t {name}_count"),
            Type::Lent(ty) => format!("const {ty} *{name}"),
        }
    }

    /// The author's argument as it crosses.
    fn crossing(self, name: &str) -> String {
        match self {
            Type::Number(_, raw, ty) if raw != ty => format!("{name}.id"),
            Type::Text => format!("dylm_text_of({name})"),
            Type::List(_) => format!("dylm_list_of({name}, {name}_count)"),
            Type::Lent(_) => format!("dylm_lent_of({name}, sizeof *{name})"),
            _ => name.to_owned(),
        }
    }
}

impl Op {
    /// What crosses: `ret (*name)(void *ctx, .., dylm_at at);`
    fn declaration(&self) -> String {
        let arguments: String = self.arguments.iter().map(|(name, ty)| format!(", {} {name}", ty.raw())).collect();
        format!("    {} (*{})(void *ctx{arguments}, dylm_at at);\n", self.returns.raw(), self.name)
    }

    /// What an author calls: a function that takes the place of the call, and a macro that states it.
    fn word(&self, table: &Table) -> String {
        let (name, place, table_type) = (&self.name, &table.name, table.type_name());
        let parameters: String = self.arguments.iter().map(|(name, ty)| format!(", {}", ty.parameter(name))).collect();
        let crossing: String = self.arguments.iter().map(|(name, ty)| format!(", {}", ty.crossing(name))).collect();
        let names = self.arguments.iter().map(|(name, ty)| match ty {
            Type::List(_) => format!(", {name}, {name}_count"),
            _ => format!(", {name}"),
        });
        let names: String = names.collect();
        // In parentheses, for a C library may have macros of names like `exp`.
        let call = format!("(d->host->{place}->{name})(d->ctx{crossing}, at)");
        let (ty, full, none) = match self.returns {
            Type::Nothing => ("void", format!("{call};"), ""),
            Type::Number("u8", ..) => ("int", format!("return {call};"), " 0"),
            Type::Number("SourceId", ..) => {
                ("dylm_stored", format!("return dylm_stored_of({call});"), " DYLM_NO_STORED")
            }
            Type::Number("Slot", ..) => {
                ("dylm_layer", format!("return dylm_layer_of({call});"), " dylm_layer_of(UINT32_MAX)")
            }
            Type::Pair => ("dylm_pair", format!("return dylm_pair_of(d, {call});"), " dylm_no_pair()"),
            // One more owner of a tensor that is known.
            _ if name == "retain" => ("dylm_tensor", format!("{call};\n    return x;"), " DYLM_NO_TENSOR"),
            _ => ("dylm_tensor", format!("return dylm_made(d, {call});"), " DYLM_NO_TENSOR"),
        };
        // What its author releases is no longer for `dylm_keep` to release.
        let full = if name == "release" { format!("dylm_forget(d, x);\n    {full}") } else { full };
        // What came after 1.0 may be missing, and the file tells that the plugin calls it.
        let guard = format!(
            "    DYLM_STAMP(needs, {name});\n    if (!DYLM_HAS(d->host->{place}, {table_type}, {name})) {{\n        \
             dylm_lacks(d, \"{name}\");\n        return{none};\n    }}\n"
        );
        let have = format!(
            "/// Whether the host has it. Asking, anywhere in a plugin, tells hosts that the plugin can do without that op.\n\
             static inline int dylm_have_{name}(const dylm *d)\n{{\n    DYLM_STAMP(asks, {name});\n    \
             return DYLM_HAS(d->host->{place}, {table_type}, {name});\n}}\n\n"
        );
        let (guard, have) = if self.later { (guard, have) } else { Default::default() };
        format!(
            "{}static inline {ty} dylm_{name}_at(dylm_at at, dylm *d{parameters})\n{{\n{guard}    {full}\n}}\n\
             #define dylm_{name}(d{names}) dylm_{name}_at(DYLM_HERE, d{names})\n\n{have}",
            comment(&self.docs, "")
        )
    }
}

impl Table {
    fn type_name(&self) -> String {
        format!("dylm_{}_ops", self.name.trim_end_matches('s'))
    }

    fn declaration(&self) -> String {
        let (name, ops) = (self.type_name(), self.ops.iter().map(Op::declaration).collect::<String>());
        format!("{}typedef struct {name} {{\n    uint64_t size;\n{ops}}} {name};\n", comment(&self.docs, ""))
    }
}

/// The ops of 1.0, table by table, then in `ops_today` those that were appended to each.
fn tables(source: &str) -> Result<Vec<Table>> {
    let mut tables: Vec<Table> = Vec::new();
    let part = |from: &str, to: &str| Some(source.split_once(from)?.1.split_once(to)?.0);
    let first = part("macro_rules! ops_1_0", "\n}\n").ok_or("ops.rs: no macro ops_1_0")?;
    for (docs, line) in declarations(first) {
        if let Some((name, doc)) = line.split_once(" = /// ") {
            tables.push(Table { docs: vec![doc.to_owned()], name: name.to_owned(), ops: Vec::new() });
        } else if let Some(table) = tables.last_mut() {
            table.ops.extend(op(docs, line.strip_prefix("last ").unwrap_or(&line), false)?);
        }
    }
    let later = part("macro_rules! ops_today", "\n}\n").ok_or("ops.rs: no macro ops_today")?;
    let later = later
        .split_once("$into")
        .ok_or("ops.rs: ops_today is not as it was")?
        .1
        .replace("{ ", "{\n")
        .replace("; ", ";\n");
    let mut place = None;
    for (docs, line) in declarations(&later) {
        if let Some(name) = line.strip_suffix(" {") {
            place = tables.iter().position(|table| table.name == name.trim_start_matches("$into ").trim());
        } else if let (Some(line), Some(place)) = (line.strip_prefix("later "), place) {
            tables[place].ops.extend(op(docs, line, true)?);
        }
    }
    Ok(tables)
}

/// `fn name(..) -> ..;`, unless it is something else.
fn op(docs: Vec<String>, line: &str, later: bool) -> Result<Option<Op>> {
    let Some(signature) = line.strip_prefix("fn ") else { return Ok(None) };
    let (head, returns) = signature.trim_end_matches(';').rsplit_once(')').ok_or(line)?;
    let (name, arguments) = head.split_once('(').ok_or(line)?;
    // The only commas inside of a type are those of `RSlice<'_, T>`.
    let arguments = arguments.replace("'_, ", "'_; ");
    let arguments = arguments.split(", ").filter(|argument| !argument.is_empty()).map(|argument| {
        let (name, ty) = argument.split_once(": ").ok_or(argument)?;
        Ok((name.to_owned(), Type::of(&ty.replace("'_; ", "'_, "), &docs)?))
    });
    let arguments = arguments.collect::<Result<Vec<_>>>().map_err(|e| format!("{line}: {e}"))?;
    let returns = Type::of(returns.trim().strip_prefix("-> ").unwrap_or("()"), &docs)?;
    Ok(Some(Op { docs, name: name.to_owned(), arguments, returns, later }))
}
