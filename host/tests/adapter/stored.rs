//! Single layers against what mlx-lm's own classes and PEFT computed; tests/fixtures/make_adapter.py made the file.

use crate::*;

struct Fixture(Value);

impl Fixture {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/adapter/layers.json");
        Fixture(serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
    }

    fn tensor(&self, name: &str) -> Named {
        let spec = self.0["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap();
        let shape: Vec<usize> =
            spec["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect();
        let (center, scale) = (spec["center"].as_f64().unwrap(), spec["scale"].as_f64().unwrap());
        let values = uniform(self.0["seed"].as_u64().unwrap(), name, shape.iter().product(), center, scale);
        Named { name: name.into(), shape, values }
    }

    fn of(&self, name: &str, as_name: &str) -> Named {
        Named { name: as_name.into(), ..self.tensor(name) }
    }

    fn turned(&self, name: &str, as_name: &str) -> Named {
        let t = self.tensor(name);
        let (n, m) = (t.shape[0], t.shape[1]);
        let values = (0..n * m).map(|i| t.values[(i % n) * m + i / n]).collect();
        Named { name: format!("base_model.model.{as_name}"), shape: vec![m, n], values }
    }

    fn expected(&self, case: &str) -> Vec<f64> {
        let case = self.0["cases"].as_array().unwrap().iter().find(|c| c["name"] == case).unwrap();
        case["y"].as_array().unwrap().iter().map(|y| y.as_f64().unwrap()).collect()
    }

    fn ids(&self, key: &str) -> Vec<u32> {
        self.0[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    fn weight(&self, name: &str, place: &Placement) -> Weight {
        let t = self.tensor(name);
        weight(&t.values, t.shape[0], t.shape[1], formats()[0], place)
    }

    /// Linear layer, embedded rows and tied logits with these adapters.
    fn outputs(&self, adapters: &Adapters, place: &Placement) -> [Vec<f32>; 3] {
        let bias = self.tensor("bias").values;
        let layer = linear(adapters, "linear", self.weight("weight", place), Some(&bias), place);
        let table = embedding(adapters, "table", self.weight("table", place), place);
        let ids = Tensor::new(self.ids("ids"), &Device::Cpu).unwrap();
        let hidden = self.tensor("hidden");
        adapters.refuse_unused().unwrap();
        [
            run(&layer, &self.tensor("x").values),
            flat(table.forward(&ids).unwrap()),
            flat(table.as_linear(&tensor(&hidden.values, &hidden.shape)).unwrap()),
        ]
    }
}

#[test]
fn linear_layers_and_embeddings_compute_what_mlx_lm_computes() {
    let fixture = Fixture::read();
    let lora = [
        fixture.of("lora_a", "linear.lora_a"),
        fixture.of("lora_b", "linear.lora_b"),
        fixture.of("table_a", "table.lora_a"),
        fixture.of("table_b", "table.lora_b"),
    ];
    let dora = [&lora[..], &[fixture.of("m", "linear.m"), fixture.of("table_m", "table.m")]].concat();
    for place in places() {
        for (kind, parts) in [("lora", &lora[..]), ("dora", &dora)] {
            let outputs = fixture.outputs(&open_mlx(kind, parts).unwrap(), &place);
            for (y, layer) in outputs.iter().zip(["linear", "embedding", "tied head"]) {
                let case = format!("mlx {kind} {layer}");
                assert_near(y, &fixture.expected(&case), &case);
            }
        }
    }
}

#[test]
fn experts_compute_what_mlx_lm_computes() {
    let fixture = Fixture::read();
    let parts = [
        fixture.of("experts_a", "mlp.switch_mlp.up_proj.lora_a"),
        fixture.of("experts_b", "mlp.switch_mlp.up_proj.lora_b"),
    ];
    let adapters = open_mlx("lora", &parts).unwrap();
    let (all, x) = (fixture.tensor("experts"), fixture.tensor("x"));
    let (rows, cols) = (all.shape[1], all.shape[2]);
    for place in places() {
        let of_token = |(token, expert): (usize, u32)| {
            let expert = expert as usize;
            let w = weight(&all.values[expert * rows * cols..][..rows * cols], rows, cols, formats()[0], &place);
            let adapter = adapters.expert(["mlp.switch_mlp.up_proj"], (expert, all.shape[0]), &w, &place).unwrap();
            run(&Linear { weight: w, bias: None, adapter }, &x.values[token * cols..][..cols])
        };
        let y: Vec<f32> = fixture.ids("chosen").into_iter().enumerate().flat_map(of_token).collect();
        assert_near(&y, &fixture.expected("mlx lora experts"), "experts");
    }
}

#[test]
fn linear_layers_and_embeddings_compute_what_peft_computes() {
    let fixture = Fixture::read();
    let lora = [
        fixture.turned("lora_a", "linear.lora_A.weight"),
        fixture.turned("lora_b", "linear.lora_B.weight"),
        fixture.turned("table_a", "table.lora_embedding_A"),
        fixture.turned("table_b", "table.lora_embedding_B"),
    ];
    let magnitudes = [
        fixture.of("m", "base_model.model.linear.lora_magnitude_vector"),
        fixture.of("table_m_peft", "base_model.model.table.lora_magnitude_vector"),
    ];
    for place in places() {
        for kind in ["lora", "dora", "rslora"] {
            let mut config = peft_config();
            let parts = if kind == "dora" { [&lora[..], &magnitudes].concat() } else { lora.to_vec() };
            if kind != "lora" {
                config[format!("use_{kind}")] = json!(true);
            }
            let outputs = fixture.outputs(&open_peft(&config, &parts).unwrap(), &place);
            for (y, layer) in outputs.iter().zip(["linear", "embedding"]) {
                let case = format!("peft {kind} {layer}");
                assert_near(y, &fixture.expected(&case), &case);
            }
            // PEFT leaves a tied head alone.
            let hidden = fixture.tensor("hidden").values;
            let table: Vec<f64> = fixture.tensor("table").values.iter().map(|w| f64::from(*w)).collect();
            assert_near(&outputs[2], &product(&hidden, &table, 16), "tied head");
        }
    }
}
