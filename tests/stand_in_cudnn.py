"""What stands in for cuDNN's graphs where there is no GPU."""

from types import SimpleNamespace

import torch

KINDS = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}


class ComputingGraph:
    """Stands in for `cudnn.pygraph`: its operations are PyTorch's, in float32."""

    class Node:
        def __init__(self, compute=None, dim=None):
            self.compute, self.dim = compute, dim

        def set_dim(self, dim):
            self.dim = dim
            return self

        def set_data_type(self, kind):
            self.kind = kind
            return self

        def set_output(self, wanted):
            return self

        set_stride = set_output

    def __init__(self, handle, io_data_type, **kinds):
        self.kind = io_data_type

    def tensor(self, dim, stride, data_type):
        # channels innermost, as cuDNN's kernels for halves want it
        assert stride[1] == 1
        return self.Node(dim=dim)

    def conv_fprop(self, image, weight, pre_padding, post_padding, stride, dilation):
        assert pre_padding == post_padding
        options = {"stride": stride, "padding": pre_padding, "dilation": dilation}
        return self.Node(lambda of: torch.nn.functional.conv2d(of(image), of(weight), **options))

    def bias(self, input, bias):
        return self.add(input, bias)

    def add(self, a, b):
        return self.Node(lambda of: of(a) + of(b))

    def mul(self, a, b):
        return self.Node(lambda of: of(a) * of(b))

    def sin(self, x):
        return self.Node(lambda of: of(x).sin())

    def tanh(self, x):
        return self.Node(lambda of: of(x).tanh())

    def create_execution_plans(self, modes):
        if self.kind == "BFLOAT16":
            raise cudnn.cudnnGraphNotSupportedError("no engine")

    def get_workspace_size(self):
        return 0

    def execute(self, tensors, workspace, handle):
        def of(node):
            return node.compute(of) if node.compute else tensors[node].float()

        for node in tensors:
            assert list(tensors[node].shape) == node.dim
            if node.compute:
                assert KINDS[tensors[node].dtype] == node.kind
                tensors[node].copy_(of(node))

    validate = build_operation_graph = check_support = build_plans = lambda self: None


cudnn = SimpleNamespace(
    pygraph=ComputingGraph,
    data_type=SimpleNamespace(HALF="HALF", BFLOAT16="BFLOAT16", FLOAT="FLOAT"),
    heur_mode=SimpleNamespace(A="A", B="B"),
    cudnnGraphNotSupportedError=type("cudnnGraphNotSupportedError", (Exception,), {}),
)
