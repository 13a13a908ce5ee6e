"""The ONNX side: graph, sessions, bundles and the parity gate."""
