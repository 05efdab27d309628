// Render Ollama templates: read a JSON list of {Template, Data} from stdin, write the list of texts to stdout.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

// An object that prints itself as the JSON that it was read from.
type object struct{ raw json.RawMessage }

func (o object) String() string { return string(o.raw) }

func (o *object) UnmarshalJSON(raw []byte) error {
	o.raw = append([]byte(nil), raw...)
	return nil
}

type call struct {
	Function struct {
		Name      string
		Arguments object
	}
}

type message struct {
	Role, Content, Thinking string
	ToolCalls               []call
}

type fields struct {
	System            string
	Tools             []struct{ Function object }
	Messages          []*message
	Think, IsThinkSet bool
}

func main() {
	var cases []struct {
		Template string
		Data     fields
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, each := range cases {
		var text strings.Builder
		parsed := template.Must(template.New("").Parse(each.Template))
		if err := parsed.Execute(&text, each.Data); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
