//! A host that lacks an extension is told so by the plugin that needs it, in a sentence; other plugins do not notice.

use dylm::{LoadOptions, Trust, plugin::extension::play_host_without_extensions};
use serde_json::json;
use tests::{
    binary,
    outside::{self, checkpoint, install},
};

#[test]
fn a_plugin_with_an_op_of_its_own_says_what_an_older_host_lacks() {
    let plugins = install(&outside::build(&outside::workspace(), "activation", "activation", None));
    let load = |model_type: &str, plugins: &std::path::Path| {
        let model = checkpoint(&[("model_type", json!(model_type))]);
        let options = LoadOptions { plugins: vec![plugins.to_owned()], trust: Trust::All, ..Default::default() };
        dylm::load(model.path().to_str(), &options).map(|_| ())
    };
    load("activation", plugins.path()).unwrap();
    play_host_without_extensions(true);
    let error = load("activation", plugins.path()).unwrap_err().to_string();
    let expected = "op gate: this dylm does not take ops of plugins (it has no extension op/1); update dylm";
    assert!(error.contains(expected), "{error}");
    load("llama", &binary::target()).unwrap();
}
