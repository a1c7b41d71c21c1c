//! tokenizer.json of the usual kind, byte pairs -> the tokenizer, in a third of the time that `tokenizers` takes for it, which reads
//! vocabulary and merges once as what they might be and then as what they are. What it would complain of is left to it.

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value as Json, json};
use std::{fmt, str::FromStr};
use tokenizers::{
    AddedToken, Tokenizer,
    models::bpe::{BPE, BpeBuilder, Merges, Vocab},
};

/// A tokenizer of a tokenizer.json without vocabulary and added tokens, of a vocabulary, and of added tokens.
pub(crate) fn joined(mut json: Json, model: BpeBuilder, added: Vec<AddedToken>) -> tokenizers::Result<Tokenizer> {
    json["model"] = json!({"type": "BPE", "vocab": {}, "merges": []});
    let mut tokenizer = Tokenizer::from_str(&json.to_string())?;
    tokenizer.with_model(model.build()?);
    tokenizer.add_tokens(added)?;
    Ok(tokenizer)
}

/// The tokenizer of a whole tokenizer.json; `None` where it is of another kind, or damaged.
pub(super) fn read(bytes: &[u8]) -> Option<Tokenizer> {
    let mut whole = serde_json::Deserializer::from_slice(bytes);
    let (mut rest, model) = whole.deserialize_map(Whole(bytes.len())).ok()?;
    whole.end().ok()?;
    let added = rest.remove("added_tokens").map(serde_json::from_value).transpose().ok()?;
    joined(Json::Object(rest), model?, added.unwrap_or_default()).ok()
}

/// A file of so many bytes.
struct Whole(usize);

impl<'de> Visitor<'de> for Whole {
    type Value = (Map<String, Json>, Option<BpeBuilder>);

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a tokenizer")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut rest, mut model) = (Map::new(), None);
        while let Some(key) = map.next_key::<String>()? {
            if key == "model" {
                model = Some(map.next_value_seed(Model(self.0))?);
            } else {
                rest.insert(key, map.next_value()?);
            }
        }
        Ok((rest, model))
    }
}

/// Its model.
struct Model(usize);

impl<'de> DeserializeSeed<'de> for Model {
    type Value = BpeBuilder;
    fn deserialize<D: Deserializer<'de>>(self, of: D) -> Result<BpeBuilder, D::Error> {
        of.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Model {
    type Value = BpeBuilder;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a vocabulary with its merges")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<BpeBuilder, A::Error> {
        let (mut bpe, mut vocab, mut merges) = (BPE::builder(), None, None);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "vocab" => vocab = Some(map.next_value_seed(Ids(self.0))?),
                "merges" => merges = Some(map.next_value_seed(Pairs)?),
                "type" if map.next_value::<String>()? == "BPE" => {}
                "type" => return Err(A::Error::custom("of another kind")),
                "dropout" => bpe = map.next_value::<Option<f32>>()?.into_iter().fold(bpe, BpeBuilder::dropout),
                "unk_token" => bpe = map.next_value::<Option<_>>()?.into_iter().fold(bpe, BpeBuilder::unk_token),
                "continuing_subword_prefix" => {
                    bpe = map.next_value::<Option<_>>()?.into_iter().fold(bpe, BpeBuilder::continuing_subword_prefix);
                }
                "end_of_word_suffix" => {
                    bpe = map.next_value::<Option<_>>()?.into_iter().fold(bpe, BpeBuilder::end_of_word_suffix);
                }
                "fuse_unk" => bpe = map.next_value::<Option<_>>()?.into_iter().fold(bpe, BpeBuilder::fuse_unk),
                "byte_fallback" => {
                    bpe = map.next_value::<Option<_>>()?.into_iter().fold(bpe, BpeBuilder::byte_fallback)
                }
                "ignore_merges" => {
                    bpe = map.next_value::<Option<_>>()?.into_iter().fold(bpe, BpeBuilder::ignore_merges)
                }
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        let (Some(vocab), Some(merges)) = (vocab, merges) else { return Err(A::Error::custom("no vocab or merges")) };
        Ok(bpe.vocab_and_merges::<Vocab>(vocab, merges))
    }
}

/// Tokens' ids.
struct Ids(usize);

impl<'de> DeserializeSeed<'de> for Ids {
    type Value = Vocab;
    fn deserialize<D: Deserializer<'de>>(self, of: D) -> Result<Vocab, D::Error> {
        of.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Ids {
    type Value = Vocab;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a map from tokens to ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
        // A token and what belongs to it take some forty to seventy bytes of the file.
        let mut ids = Vocab::with_capacity(self.0 / 64);
        while let Some((token, id)) = map.next_entry()? {
            ids.insert(token, id);
        }
        Ok(ids)
    }
}

/// Merges: pairs, or texts with a space between the two.
struct Pairs;

impl<'de> DeserializeSeed<'de> for Pairs {
    type Value = Merges;
    fn deserialize<D: Deserializer<'de>>(self, of: D) -> Result<Merges, D::Error> {
        of.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Pairs {
    type Value = Merges;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merges, A::Error> {
        let mut pairs = Merges::new();
        while let Some(pair) = list.next_element_seed(Pair)? {
            pairs.extend(pair);
        }
        Ok(pairs)
    }
}

/// One of them, unless it is a version.
struct Pair;

impl<'de> DeserializeSeed<'de> for Pair {
    type Value = Option<(String, String)>;
    fn deserialize<D: Deserializer<'de>>(self, of: D) -> Result<Self::Value, D::Error> {
        of.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Pair {
    type Value = Option<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        if text.starts_with("#version") {
            return Ok(None);
        }
        match text.split_once(' ') {
            Some((a, b)) if !b.contains(' ') => Ok(Some((a.to_owned(), b.to_owned()))),
            _ => Err(E::custom("not two tokens")),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        match (list.next_element()?, list.next_element()?, list.next_element::<IgnoredAny>()?) {
            (Some(a), Some(b), None) => Ok(Some((a, b))),
            _ => Err(A::Error::custom("not two tokens")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(model: Json) -> Json {
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [
                {"id": 9, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": true, "normalized": false, "special": true},
                {"id": 2, "content": "ab", "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": false}
            ],
            "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
            "decoder": {"type": "BPEDecoder", "suffix": "</w>"}, "model": model,
        })
    }

    #[test]
    fn the_tokenizer_is_the_one_that_the_library_reads() {
        let vocab = json!({"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4, "<unk>": 5, "é\n": 6});
        for merges in [json!([["a", "b"], ["ab", "c"]]), json!(["#version: 0.2", "a b", "ab c"])] {
            for (unk, flag) in [(json!("<unk>"), true), (Json::Null, false)] {
                let whole = whole(json!({
                    "type": "BPE", "dropout": null, "unk_token": unk, "continuing_subword_prefix": null,
                    "end_of_word_suffix": null, "fuse_unk": flag, "byte_fallback": flag, "ignore_merges": flag,
                    "vocab": vocab, "merges": merges, "other": [1, {"a": "b"}],
                }));
                let text = whole.to_string();
                let (ours, theirs) = (read(text.as_bytes()).unwrap(), Tokenizer::from_str(&text).unwrap());
                let written = |t: &Tokenizer| serde_json::to_string(t).unwrap();
                assert_eq!(written(&ours), written(&theirs));
                let ids = |t: &Tokenizer| t.encode("abc <s> ABcab", true).unwrap().get_ids().to_vec();
                assert_eq!(ids(&ours), ids(&theirs));
            }
        }
    }

    #[test]
    fn what_is_not_of_byte_pairs_or_damaged_is_left_to_the_library() {
        let good = json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]});
        assert!(read(whole(good.clone()).to_string().as_bytes()).is_some());
        let with = |key: &str, value: Json| {
            let mut model = good.clone();
            model[key] = value;
            whole(model).to_string()
        };
        let texts = [
            with("type", "WordLevel".into()),
            with("merges", json!(["a b c"])),
            with("merges", json!([["a"]])),
            with("merges", json!(["a d"])),
            with("vocab", json!({"a": -1})),
            with("dropout", json!(2.5)),
            whole(json!({"type": "BPE", "vocab": {}})).to_string(),
            whole(good.clone()).to_string() + "}",
            json!({"model": good, "version": "2.0"}).to_string(),
            "{}".to_owned(),
            "[]".to_owned(),
        ];
        for text in texts {
            assert!(read(text.as_bytes()).is_none(), "{text}");
        }
    }
}
